"""The errors callers can react to; each message says what is wrong and what to do."""


class KVAgentError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(KVAgentError, ValueError):
    """A setting is wrong; the user must change it."""


class UnsupportedModelError(ConfigError):
    """The model or engine set-up cannot be served correctly, so the plugin refuses to start."""


class StorageError(KVAgentError):
    """Disk or catalog trouble; stored data may be fine, trying again later may help."""


class UnstorableError(StorageError):
    """The disk is fine, what was to be stored is not: trying again is useless, others can be stored."""


class CorruptChunkError(StorageError):
    """A blob's bytes are not what was written: checksum, header or shape differ. Quarantine it."""


class EngineError(KVAgentError):
    """The engine could not be started, or it died."""


class ServerError(KVAgentError):
    """A memory server cannot be reached or cannot do it now; trying again later may help."""
