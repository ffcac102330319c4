"""kv_agent: every turn a model computes becomes a memory whose KV cache can be put back."""

from kv_agent.chunks import Scope, TurnFilter
from kv_agent.errors import (
    ConfigError,
    CorruptChunkError,
    EngineError,
    KVAgentError,
    ServerError,
    StorageError,
    UnsupportedModelError,
)
from kv_agent.manager import CacheManager
from kv_agent.memories import Answer, Memory, Stats
from kv_agent.memory import AgentMemory
from kv_agent.remote.asynchronous import AsyncAgentMemory
from kv_agent.storage.policy import Policy, Usage
from kv_agent.storage.retention import Retention

__all__ = [
    "AgentMemory",
    "Answer",
    "AsyncAgentMemory",
    "CacheManager",
    "ConfigError",
    "CorruptChunkError",
    "EngineError",
    "KVAgentError",
    "Memory",
    "Policy",
    "Retention",
    "Scope",
    "ServerError",
    "Stats",
    "StorageError",
    "TurnFilter",
    "UnsupportedModelError",
    "Usage",
]
