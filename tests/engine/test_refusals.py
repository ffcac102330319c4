"""What starts with the plugin and what is refused: every supported architecture, and wrong set-ups.

Every engine is started in a process of its own, with a tiny model of random weights where the bundled one
does not do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine import support

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 180
AT_A_TIME = 2
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.2,  # with the usual 0.02 the context hardly changes the answer
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + 0.25 * plane for plane in range(16)],
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    exit_code: int
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A set-up that must not start. ``architecture`` is a transformers class name, ``None`` the bundled model."""

    sentence: str
    architecture: str | None = None
    sizes: Mapping[str, Any] = ()  # type: ignore[assignment]
    role: str = "kv_both"
    settings: Mapping[str, Any] = ()  # type: ignore[assignment]
