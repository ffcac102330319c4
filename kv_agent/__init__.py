"""kv_agent: every turn a model computes becomes a memory whose KV cache can be put back."""

from kv_agent.chunks import Scope, TurnFilter
from kv_agent.errors import (
    ConfigError,
    CorruptChunkError,
    EngineError,
    KVAgentError,
    StorageError,
    UnsupportedModelError,
)
from kv_agent.manager import CacheManager
from kv_agent.memory import AgentMemory, Answer, Memory

__all__ = [
    "AgentMemory",
    "Answer",
    "CacheManager",
    "ConfigError",
    "CorruptChunkError",
    "EngineError",
    "KVAgentError",
    "Memory",
    "Scope",
    "StorageError",
    "TurnFilter",
    "UnsupportedModelError",
]
