"""Chunk tensors to blob file content and back: pure, no files.

A blob is one safetensors file. Its metadata names the format, its version, the fingerprint, the SHA-256
of every tensor and, as ``layout``, dtype and shape of every tensor a second time: checksums cover the
data only, so without it damage to the header could turn float16 into int16 unnoticed.
"""

# L layers, 2 = (key, value), T tokens, H kv heads, D head dim

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kv_agent.chunks import ChunkKey, ChunkRecord, Fingerprint
from kv_agent.errors import CorruptChunkError

FORMAT = "kv_agent"
FORMAT_VERSION = 1

PREFIX_BYTES = 8  # a safetensors file starts with the length of its header
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpan:
    """Where one tensor's bytes are: file bytes ``[start, end)``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def checksum(tensor: Tensor) -> str:
    """SHA-256, in hexadecimal, of the bytes of a CPU tensor in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def encode(tensors: Mapping[ChunkKey, Tensor], fingerprint: Fingerprint) -> bytes:
    """Content of a blob file holding ``tensors``: contiguous ``[L, 2, T, H, D]`` on the CPU."""
    distinct: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, kv_L2THD in tensors.items():
        _require_chunk(key, kv_L2THD)
        # safetensors refuses tensors that share memory; equal bytes under two keys are legitimate here.
        distinct[key] = kv_L2THD.clone() if kv_L2THD.data_ptr() in seen else kv_L2THD.detach()
        seen.add(kv_L2THD.data_ptr())
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint": fingerprint,
        "sha256": json.dumps({key: checksum(tensor) for key, tensor in distinct.items()}),
        "layout": json.dumps(
            {key: [_DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for key, tensor in distinct.items()}
        ),
    }
    return save(distinct, metadata)


def header_bytes(prefix: bytes, file_bytes: int) -> int:
    """Length of the header that follows the first ``PREFIX_BYTES`` of a file of ``file_bytes``."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) != PREFIX_BYTES or length > min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES):
        raise CorruptChunkError("the file is shorter than its header says")
    return length


def find_tensor(header: bytes, name: str, file_bytes: int) -> TensorSpan:
    """Where tensor ``name`` is, after checking everything the header says about it."""
    try:
        fields = json.loads(header)
        metadata = fields["__metadata__"]
        if (metadata["format"], metadata["format_version"]) != (FORMAT, str(FORMAT_VERSION)):
            raise CorruptChunkError(
                f"format {metadata['format']!r} version {metadata['format_version']!r} is not"
                f" {FORMAT!r} version {FORMAT_VERSION}"
            )
        field = fields[name]
        dtype, shape = _DTYPES[field["dtype"]], field["shape"]
        begin, end = field["data_offsets"]
        layout = json.loads(metadata["layout"])[name]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise CorruptChunkError(f"unreadable header, or no tensor {name!r} in it: {err!r}") from err
    if layout != [field["dtype"], shape] or not _is_chunk_shape(shape) or not _are_sizes([begin, end]):
        raise CorruptChunkError(f"the header contradicts itself about tensor {name!r}")
    data_start = PREFIX_BYTES + len(header)
    if end - begin != math.prod(shape) * dtype.itemsize or data_start + end > file_bytes:
        raise CorruptChunkError(f"tensor {name!r} does not fit its bytes, or the file is truncated")
    return TensorSpan(dtype=dtype, shape=tuple(shape), start=data_start + begin, end=data_start + end)


def decode(data: bytes, name: str) -> Tensor:
    """Tensor ``name`` of a whole blob in memory; compare its checksum, which is not done here."""
    length = header_bytes(data[:PREFIX_BYTES], len(data))
    span = find_tensor(data[PREFIX_BYTES : PREFIX_BYTES + length], name, len(data))
    bits = torch.frombuffer(bytearray(data[span.start : span.end]), dtype=torch.uint8)
    return bits.view(span.dtype).view(span.shape)


def verify(tensor: Tensor, record: ChunkRecord) -> None:
    """Raise :class:`CorruptChunkError` unless ``tensor`` is what ``record`` says was stored."""
    if tensor.dim() != 5 or tensor.shape[2] != record.num_tokens:
        raise CorruptChunkError(
            f"chunk {record.key}: shape {tuple(tensor.shape)} does not hold {record.num_tokens} tokens"
        )
    if tensor.nbytes != record.num_bytes:
        raise CorruptChunkError(f"chunk {record.key}: {tensor.nbytes} bytes instead of {record.num_bytes}")
    if checksum(tensor) != record.sha256:
        raise CorruptChunkError(f"chunk {record.key}: checksum differs from the catalog's")


def _require_chunk(key: ChunkKey, tensor: Tensor) -> None:
    if tensor.dim() != 5 or tensor.shape[1] != 2 or not tensor.numel():
        raise ValueError(f"chunk {key} must be [L, 2, T, H, D], got {tuple(tensor.shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"chunk {key} must be contiguous on the CPU, got {tensor.device}")
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"chunk {key} has dtype {tensor.dtype}; known: {', '.join(_DTYPES)}")


def _is_chunk_shape(shape: object) -> bool:
    # Without a zero, a product that fits the file bounds every factor, so torch can represent the shape.
    return isinstance(shape, list) and len(shape) == 5 and _are_sizes(shape) and 0 not in shape


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
