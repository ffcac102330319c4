"""Who may ask the plugin for something: where a server process has a key, only what it signed counts.

The key is a secret of one process and the engine it started, in the environment that the engine inherits.
Without one (vLLM as a library, or a server without the memory routes) whoever can send a request may ask.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

SIGNING_ENV = "KV_AGENT_SIGNING_KEY"

_FIELD = "signature"


def make_key() -> None:
    """Give this process and those it starts a key, unless it has one."""
    os.environ.setdefault(SIGNING_ENV, secrets.token_hex(32))


def signing_key() -> bytes | None:
    key = os.environ.get(SIGNING_ENV)
    return key.encode() if key else None


def signed(options: Mapping[str, Any], key: bytes | None) -> dict[str, Any]:
    """The plugin's request fields, with a signature where there is a key."""
    fields = dict(options)
    return fields if key is None else fields | {_FIELD: _signature(fields, key)}


def verified(options: object, key: bytes | None) -> object | None:
    """The fields without their signature; ``None`` if there is a key and this is not what it signs."""
    if key is None:
        return options
    if not isinstance(options, Mapping):
        return None
    fields = {name: value for name, value in options.items() if name != _FIELD}
    given = options.get(_FIELD)
    try:
        is_ours = isinstance(given, str) and hmac.compare_digest(
            given.encode(), _signature(fields, key).encode()
        )
    except (TypeError, ValueError):  # what is not JSON was not signed
        is_ours = False
    return fields if is_ours else None


def _signature(fields: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
