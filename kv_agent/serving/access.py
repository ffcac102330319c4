"""Who may see what: API keys, each of one namespace, kept as hashes in a file, read anew when it changes.

The file is JSON: ``{"keys": [{"sha256": "…", "namespace": "acme", "admin": false}], "requests_per_minute":
{"acme": 600}}``.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kv_agent.errors import ConfigError
from kv_agent.serving.errors import RequestError

logger = logging.getLogger(__name__)

KEYS_ENV = "KV_AGENT_MEMORY_KEYS"
NAMESPACE_HEADER = "X-Memory-Namespace"
DEFAULT_NAMESPACE = "default"

_Name = Annotated[str, Field(min_length=1, max_length=256)]


class KeyEntry(BaseModel):
    """One key: the SHA-256 of its text, whose it is, and whether it may name other namespaces."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    namespace: _Name
    admin: bool = False


class KeyFile(BaseModel):
    """The whole file. Namespaces without ``requests_per_minute`` may ask as often as they like."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyEntry, ...] = ()
    requests_per_minute: dict[_Name, Annotated[int, Field(ge=1)]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose memories a request is about."""

    namespace: str
    is_admin: bool = False


def read_keys(path: Path) -> KeyFile:
    """Raises :class:`ConfigError` naming the file and what is wrong with it."""
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"cannot read the memory keys: {err}; `kv-agent keys add` makes the file") from err
    except ValidationError as err:
        where = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in err.errors()[:5])
        raise ConfigError(f"memory keys {path}: {where}") from err


def add_key(path: Path, namespace: str, *, is_admin: bool = False) -> str:
    """Add a new random key for a namespace to the file, which is made if there is none -> the key.

    Only its hash is kept: whoever loses the key needs another.
    """
    key = f"kva-{secrets.token_urlsafe(32)}"
    try:
        entry = KeyEntry(sha256=digest_of(key), namespace=namespace, admin=is_admin)
    except ValidationError as err:
        raise ConfigError(f"no namespace can have this name: {err.errors()[0]['msg']}") from err
    with _changing(path):
        known = read_keys(path) if path.exists() else KeyFile()
        _write(path, known.model_copy(update={"keys": (*known.keys, entry)}))
    return key


def remove_key(path: Path, sha256: str) -> KeyEntry:
    """Take away the one key whose hash begins like this; it is refused from then on."""
    read_keys(path)  # says what is wrong with it; a file that is not there needs no lock
    with _changing(path):
        known = read_keys(path)
        found = [entry for entry in known.keys if sha256 and entry.sha256.startswith(sha256)]
        if len(found) != 1:
            raise ConfigError(
                f"{len(found)} keys have a hash that begins with {sha256!r}; name one of {path}"
            )
        _write(path, known.model_copy(update={"keys": tuple(one for one in known.keys if one != found[0])}))
    return found[0]


def digest_of(key: str) -> str:
    """What a key is kept as."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class Access:
    """Tells callers by their keys.

    ``path`` is the file of keys. Without one the ``server_keys`` (vLLM's own ``--api-key``) all open the one
    namespace there is then; without those, too, everybody may.
    """

    def __init__(self, path: Path | None = None, server_keys: Sequence[str] = ()) -> None:
        self._path = path
        self._state: tuple[int, ...] = ()
        if path is not None:
            self._file = read_keys(path)
            self._state = _state_of(path)
        else:
            self._file = KeyFile(
                keys=tuple(
                    KeyEntry(sha256=digest_of(key), namespace=DEFAULT_NAMESPACE) for key in server_keys
                )
            )
        self.is_open = path is None and not server_keys

    def caller(self, key: str | None, namespace: str | None = None) -> Caller:
        """Who has this key; ``namespace`` is the one an admin wants to act in.

        Raises :class:`RequestError`: 401 without a good key, 403 where somebody else names a namespace.
        """
        self._reread()
        own = Caller(namespace=DEFAULT_NAMESPACE) if self.is_open else self._known(key)
        if namespace is None or namespace == own.namespace:
            return own
        if not own.is_admin:
            raise RequestError(403, "only an admin key may name a namespace")
        if not 1 <= len(namespace) <= 256:
            raise RequestError(400, "a namespace has 1 to 256 characters", param=NAMESPACE_HEADER)
        return Caller(namespace=namespace, is_admin=True)

    def requests_per_minute(self, namespace: str) -> int | None:
        return self._file.requests_per_minute.get(namespace)

    def _known(self, key: str | None) -> Caller:
        digest = "" if key is None else digest_of(key)
        found = None
        for entry in self._file.keys:  # all of them: the time must not tell which
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            raise RequestError(
                401,
                "an API key is needed: send it as `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Caller(namespace=found.namespace, is_admin=found.admin)

    def _reread(self) -> None:
        if self._path is None or (state := _state_of(self._path)) == self._state:
            return
        self._state = state
        try:
            self._file = read_keys(self._path)
        except ConfigError as err:
            logger.warning("the keys stay as they were: %s", err, extra={"event": "keys_unreadable"})


def bearer(authorization: str | None) -> str | None:
    """The key of an ``Authorization`` header."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _state_of(path: Path) -> tuple[int, ...]:
    """Changes when the file does; nothing while it cannot be seen."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return state.st_ino, state.st_size, state.st_mtime_ns


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One process after the other: each reads what the one before wrote.

    The lock is on a file beside, which stays: the file of keys is another one after each change.
    """
    beside = path.absolute().with_name(f".{path.name}.lock")
    try:
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise ConfigError(f"cannot write the memory keys: {err}") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when it is closed, or its process ends
        yield
    finally:
        os.close(lock)


def _write(path: Path, content: KeyFile) -> None:
    """In one step, readable by its owner only."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            file.write(content.model_dump_json(indent=2) + "\n")
        os.replace(file.name, path)
    except OSError as err:
        raise ConfigError(f"cannot write the memory keys: {err}") from err
