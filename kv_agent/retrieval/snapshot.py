"""A namespace index as one file: safetensors with a format version and a checksum over all it says.

A snapshot only saves time, so reading never fails: whatever is wrong with the file, it is not used.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

logger = logging.getLogger(__name__)

_REBUILT = {"event": "index_rebuilt"}

_FORMAT = "kv_agent.index.4"

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """``header`` is JSON-able and says whose index it is; ``arrays`` are C-contiguous."""

    header: Mapping[str, Any]
    arrays: Arrays


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Replace ``path`` at once, never half; raises ``OSError``."""
    header = json.dumps(snapshot.header, sort_keys=True)
    metadata = {"format": _FORMAT, "header": header, "crc32": _checksum(header, snapshot.arrays)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(snapshot.arrays, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except SafetensorError as err:  # how safetensors reports a full disk
        raise OSError(f"cannot write {unfinished}: {err}") from err
    finally:
        unfinished.unlink(missing_ok=True)


def read_snapshot(path: Path, expected: Mapping[str, Any]) -> Snapshot | None:
    """The snapshot whose header has all of ``expected``; ``None``, with one warning, if it cannot be used."""
    if not path.exists():
        return None
    try:
        snapshot = _read(path)
    except (OSError, SafetensorError, ValueError, KeyError) as err:
        logger.warning("index snapshot %s is ignored, the index is built anew: %s", path, err, extra=_REBUILT)
        return None
    if any(snapshot.header.get(name) != value for name, value in expected.items()):
        logger.warning(
            "index snapshot %s is ignored, the index is built anew: it is of another index",
            path,
            extra=_REBUILT,
        )
        return None
    return snapshot


def _read(path: Path) -> Snapshot:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format is {metadata.get('format')!r}, not {_FORMAT!r}")
        arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["crc32"] != _checksum(metadata["header"], arrays):
        raise ValueError("checksum differs")
    return Snapshot(header=json.loads(metadata["header"]), arrays=arrays)


def _checksum(header: str, arrays: Arrays) -> str:
    """CRC-32: a torn or damaged file is to be noticed, and gigabytes of it are to be read in seconds."""
    value = zlib.crc32(header.encode())
    for name, values in sorted(arrays.items()):
        value = zlib.crc32(f"|{name} {values.dtype.str} {values.shape}|".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(values).data, value)
    return f"{value:08x}"
