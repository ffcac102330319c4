"""Bytes of numbers made smaller without loss: pure, no files.

The bytes of a number are not alike: in a bfloat16 the upper byte holds most of the exponent, which repeats,
the lower one the mantissa, which does not. So byte i of all numbers is put together as one *plane*, and each
plane is compressed by itself; in one frame they would share one code, and small chunks would gain little.

Packed bytes are, plane by plane: length of the frame as an unsigned 64-bit little-endian integer, then one
zstd frame (RFC 8878) with content size and checksum.
"""

# N numbers, I bytes per number

from __future__ import annotations

import numpy as np
import torch
import zstandard
from torch import Tensor

from kv_agent.errors import CorruptChunkError

# Measured on KV-like numbers: higher levels are slower and, without repetitions to find, no smaller.
_LEVEL = 1

_LENGTH_BYTES = 8


def compress(data: Tensor, item_bytes: int) -> Tensor:
    """Packed bytes of a flat uint8 tensor on the CPU whose numbers have ``item_bytes`` each."""
    if data.dim() != 1 or data.dtype != torch.uint8 or item_bytes < 1 or len(data) % item_bytes:
        raise ValueError(
            f"data must be flat uint8 in whole numbers of {item_bytes} bytes, got"
            f" {data.dtype} of shape {tuple(data.shape)}"
        )
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)  # not to be shared by threads
    numbers_NI = data.view(-1, item_bytes)
    parts: list[bytes] = []
    for byte_idx in range(item_bytes):
        plane_N = numbers_NI[:, byte_idx].contiguous()  # much faster than transposing all at once
        frame = compressor.compress(plane_N.numpy().data)
        parts += [len(frame).to_bytes(_LENGTH_BYTES, "little"), frame]
    return torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)


def decompress(packed: Tensor, item_bytes: int, num_bytes: int) -> Tensor:
    """The ``num_bytes`` that were compressed, or :class:`CorruptChunkError` if they were not these.

    How much memory is taken depends on ``num_bytes`` alone, whatever the packed bytes say.
    """
    if item_bytes < 1 or num_bytes < 0 or num_bytes % item_bytes:
        raise CorruptChunkError(f"{num_bytes} bytes are not whole numbers of {item_bytes} bytes")
    num_items = num_bytes // item_bytes
    frames = [_checked(frame, num_items) for frame in _frames(packed, item_bytes)]
    numbers_NI = torch.empty(num_items, item_bytes, dtype=torch.uint8)
    decompressor = zstandard.ZstdDecompressor()
    for byte_idx, frame in enumerate(frames):
        try:
            plane = decompressor.decompress(frame, max_output_size=num_items, allow_extra_data=False)
        except zstandard.ZstdError as err:
            raise CorruptChunkError(f"packed bytes are damaged: {err}") from err
        if len(plane) != num_items:
            raise CorruptChunkError(f"{len(plane)} packed numbers instead of {num_items}")
        numbers_NI.numpy()[:, byte_idx] = np.frombuffer(plane, dtype=np.uint8)
    return numbers_NI.view(-1)


def _frames(packed: Tensor, count: int) -> list[memoryview]:
    """That many frames, which must be all there is."""
    rest = memoryview(packed.numpy().data)
    found: list[memoryview] = []
    for _ in range(count):
        length = int.from_bytes(rest[:_LENGTH_BYTES], "little")
        rest = rest[_LENGTH_BYTES:]
        if length > len(rest):
            raise CorruptChunkError("packed bytes end early")
        found.append(rest[:length])
        rest = rest[length:]
    if rest:
        raise CorruptChunkError(f"{len(rest)} bytes follow the packed ones")
    return found


def _checked(frame: memoryview, num_items: int) -> memoryview:
    # A frame's own size decides how much zstd allocates, so it is looked at before.
    try:
        parameters = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as err:
        raise CorruptChunkError(f"packed bytes are damaged: {err}") from err
    if parameters.content_size != num_items or not parameters.has_checksum:
        raise CorruptChunkError(f"packed bytes are not {num_items} numbers with a checksum")
    return frame
