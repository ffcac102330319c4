"""Chunk tensors to blob file content and back: pure, no files.

A blob is one safetensors file. Its metadata names the format, its version, the fingerprint, the checksum
of every tensor and, as ``layout``, dtype and shape of every tensor a second time: checksums cover the
data only, so without it damage to the header could turn float16 into int16 unnoticed. A chunk that is not
stored as it is has a tensor of plain bytes, and ``coding`` says what they are of.
"""

# L layers, 2 = (key, value), T tokens, H kv heads, D head dim

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from kv_agent.chunks import RAW, ChunkKey, ChunkRecord, Fingerprint
from kv_agent.errors import CorruptChunkError
from kv_agent.storage.codecs import CODECS, Coded, Payload, codec_of, data_of

FORMAT = "kv_agent"
FORMAT_VERSION = 3
KNOWN_VERSIONS = ("1", "2", "3")  # 1 knew no codecs; until 2 checksums were SHA-256

PREFIX_BYTES = 8  # a safetensors file starts with the length of its header
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_HEADER_ALIGNMENT = 8
_KEPT_HEADER_BYTES = 1 << 20  # longer ones are read anew for every tensor
_BLAKE3 = "blake3:"  # what a checksum begins with; one of SHA-256 is its 64 digits alone
_NO_CHECKSUM = _BLAKE3 + "0" * 64

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
    """Where one chunk's bytes are: file bytes ``[start, end)``. They are KV of that dtype and shape, written
    by ``codec``.
    """

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def payload(self, data: Tensor) -> Payload:
        """What the bytes (uint8) of this span are."""
        if self.codec == RAW:
            return data.view(self.dtype).view(self.shape)
        return Coded(codec=self.codec, dtype=self.dtype, shape=self.shape, data=data)


def checksum(chunk: Payload) -> str:
    """``blake3:`` and the BLAKE3 hash, in hexadecimal, of a chunk's bytes on the CPU in row-major order.

    Of a coded one it covers also what the bytes are of. BLAKE3 is several times faster than SHA-256, which
    took most of the time of reading a chunk.
    """
    return _BLAKE3 + _digest(chunk, blake3())


def _digest(chunk: Payload, digest: Any) -> str:
    if isinstance(chunk, Coded):
        shape = ",".join(map(str, chunk.shape))
        digest.update(f"{chunk.codec} {_DTYPE_NAMES[chunk.dtype]} {shape}\n".encode())
    digest.update(_bytes_of(chunk))
    return str(digest.hexdigest())


def is_of(chunk: Payload, stored: str) -> bool:
    """Whether a checksum, of any version of the format, is this chunk's."""
    return (checksum(chunk) if stored.startswith(_BLAKE3) else _digest(chunk, hashlib.sha256())) == stored


class _Header(NamedTuple):
    """What a header says of each tensor, by name; nobody may change it."""

    fields: Mapping[str, Any]
    layout: Mapping[str, Any]
    coding: Mapping[str, Any]

    @classmethod
    def of(cls, header: bytes) -> _Header:
        """Raises :class:`CorruptChunkError`, or whatever comes of content that is none."""
        fields = json.loads(header)
        metadata = fields["__metadata__"]
        if metadata["format"] != FORMAT or metadata["format_version"] not in KNOWN_VERSIONS:
            raise CorruptChunkError(
                f"format {metadata['format']!r} version {metadata['format_version']!r} is not"
                f" {FORMAT!r} version {' or '.join(KNOWN_VERSIONS)}"
            )
        layout, coding = json.loads(metadata["layout"]), json.loads(metadata.get("coding", "{}"))
        return cls(fields, layout, coding)


# Chunks of one blob are read one after another, and all of them have its header.
_read_header = lru_cache(maxsize=16)(_Header.of)


class Part(NamedTuple):
    """Bytes of a blob and where in it they stand."""

    offset: int
    data: memoryview | bytes


class Draft:
    """A blob to be written: ``chunks`` as they are, contiguous ``[L, 2, T, H, D]`` on the CPU, or coded."""

    def __init__(self, chunks: Mapping[ChunkKey, Payload], fingerprint: Fingerprint) -> None:
        for key, chunk in chunks.items():
            if isinstance(chunk, Tensor):
                _require_chunk(key, chunk)
        # The largest items first, so that all stand at a multiple of their size, as safetensors has it.
        self._chunks = dict(sorted(chunks.items(), key=lambda item: (-data_of(item[1]).itemsize, item[0])))
        self._fingerprint = fingerprint
        self._checksums: dict[ChunkKey, str] = {}

    def checksum(self, key: ChunkKey) -> str:
        """See :func:`checksum`; a chunk's is computed once."""
        if key not in self._checksums:
            self._checksums[key] = checksum(self._chunks[key])
        return self._checksums[key]

    def parts(self) -> Iterator[Part]:
        """All of the blob, its beginning last.

        The header has the checksums, which are computed while the disk takes the bytes given before.
        """
        offset = len(self._header(dict.fromkeys(self._chunks, _NO_CHECKSUM)))
        for key, chunk in self._chunks.items():
            yield Part(offset, _bytes_of(chunk))
            offset += chunk.nbytes
            self.checksum(key)
        yield Part(0, self._header(self._checksums))

    def _header(self, checksums: Mapping[ChunkKey, str]) -> bytes:
        """Everything before the data; equally long whatever the checksums are."""
        layout = {key: _layout(data_of(chunk)) for key, chunk in self._chunks.items()}
        coding = {
            key: [chunk.codec, _DTYPE_NAMES[chunk.dtype], list(chunk.shape)]
            for key, chunk in self._chunks.items()
            if isinstance(chunk, Coded)
        }
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": self._fingerprint,
            "checksums": json.dumps(checksums),
            "layout": json.dumps(layout),
            "coding": json.dumps(coding),
        }
        fields: dict[str, object] = {"__metadata__": metadata}
        begin = 0
        for key, (dtype, shape) in layout.items():
            end = begin + self._chunks[key].nbytes
            fields[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _HEADER_ALIGNMENT)
        return len(header).to_bytes(PREFIX_BYTES, "little") + header


def encode(chunks: Mapping[ChunkKey, Payload], fingerprint: Fingerprint) -> bytes:
    """A whole blob in memory, see :class:`Draft`."""
    *data, header = Draft(chunks, fingerprint).parts()
    return b"".join(part.data for part in (header, *data))


def header_bytes(prefix: bytes, file_bytes: int) -> int:
    """Length of the header that follows the first ``PREFIX_BYTES`` of a file of ``file_bytes``."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) != PREFIX_BYTES or length > min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES):
        raise CorruptChunkError("the file is shorter than its header says")
    return length


def find_tensor(header: bytes, name: str, file_bytes: int) -> TensorSpan:
    """Where tensor ``name`` is, after checking everything the header says about it."""
    try:
        said = _read_header(header) if len(header) <= _KEPT_HEADER_BYTES else _Header.of(header)
        field = said.fields[name]
        dtype, shape = _DTYPES[field["dtype"]], field["shape"]
        begin, end = field["data_offsets"]
        layout, coding = said.layout[name], said.coding.get(name)
        codec, kv_dtype, kv_shape = (RAW, dtype, shape) if coding is None else _coding(coding)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise CorruptChunkError(f"unreadable header, or no tensor {name!r} in it: {err!r}") from err
    is_sound = layout == [field["dtype"], shape] and _is_chunk_shape(kv_shape) and _are_sizes([begin, end])
    if not is_sound or (coding is not None and not (dtype == torch.uint8 and _is_run(shape))):
        raise CorruptChunkError(f"the header contradicts itself about tensor {name!r}")
    data_start = PREFIX_BYTES + len(header)
    if end - begin != math.prod(shape) * dtype.itemsize or data_start + end > file_bytes:
        raise CorruptChunkError(f"tensor {name!r} does not fit its bytes, or the file is truncated")
    return TensorSpan(
        codec=codec,
        dtype=kv_dtype,
        shape=tuple(kv_shape),
        start=data_start + begin,
        end=data_start + end,
    )


def decode(data: bytes, name: str) -> Payload:
    """Chunk ``name`` of a whole blob in memory; compare its checksum, which is not done here."""
    length = header_bytes(data[:PREFIX_BYTES], len(data))
    span = find_tensor(data[PREFIX_BYTES : PREFIX_BYTES + length], name, len(data))
    return span.payload(torch.frombuffer(bytearray(data[span.start : span.end]), dtype=torch.uint8))


def verify(chunk: Payload, record: ChunkRecord) -> None:
    """Raise :class:`CorruptChunkError` unless ``chunk`` is what ``record`` says was stored."""
    if codec_of(chunk) != record.codec:
        raise CorruptChunkError(
            f"chunk {record.key}: stored as {codec_of(chunk)}, the catalog says {record.codec}"
        )
    if len(chunk.shape) != 5 or chunk.shape[2] != record.num_tokens:
        raise CorruptChunkError(
            f"chunk {record.key}: shape {tuple(chunk.shape)} does not hold {record.num_tokens} tokens"
        )
    if chunk.nbytes != record.num_bytes:
        raise CorruptChunkError(f"chunk {record.key}: {chunk.nbytes} bytes instead of {record.num_bytes}")
    if not is_of(chunk, record.checksum):
        raise CorruptChunkError(f"chunk {record.key}: checksum differs from the catalog's")


def _bytes_of(chunk: Payload) -> memoryview:
    data: memoryview = data_of(chunk).detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _layout(data: Tensor) -> tuple[str, list[int]]:
    return _DTYPE_NAMES[data.dtype], list(data.shape)


def _require_chunk(key: ChunkKey, tensor: Tensor) -> None:
    if tensor.dim() != 5 or tensor.shape[1] != 2 or not tensor.numel():
        raise ValueError(f"chunk {key} must be [L, 2, T, H, D], got {tuple(tensor.shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"chunk {key} must be contiguous on the CPU, got {tensor.device}")
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"chunk {key} has dtype {tensor.dtype}; known: {', '.join(_DTYPES)}")


def _coding(entry: list[Any]) -> tuple[str, torch.dtype, list[Any]]:
    codec, dtype, shape = entry
    if codec not in CODECS or codec == RAW or len(shape) != 5:
        raise CorruptChunkError(f"codec {codec!r} of a chunk {shape} is not known")
    return codec, _DTYPES[dtype], shape


def _is_run(shape: object) -> bool:
    return isinstance(shape, list) and len(shape) == 1 and _are_sizes(shape)


def _is_chunk_shape(shape: object) -> bool:
    # Without a zero, a product that fits the file bounds every factor, so torch can represent the shape.
    return isinstance(shape, list) and len(shape) == 5 and _are_sizes(shape) and 0 not in shape


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
