"""How a chunk's KV is written: as it is, or in fewer bits, and compressed on top if that is wanted.

Keys are quantised before rotation and per channel, because a channel then keeps its range along the text;
values per token. What is not ``raw`` becomes one run of bytes: keys, then values, each as
:func:`kv_agent.kv.quantize.quantise` writes them.
"""

# L layers, 2 = (key, value), T tokens, H kv heads, D head dim

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from kv_agent.chunks import RAW, CodecName
from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.kv import dequantise_gpu, dequantise_kernel, tried_kernels
from kv_agent.kv.quantize import Layout, Quantised, dequantise, quantise
from kv_agent.kv.rope import RotaryScheme, place_keys, turns_of, unrotate_keys
from kv_agent.storage.compression import compress, decompress

CODECS: tuple[CodecName, ...] = get_args(CodecName)

_BITS = {"int8": 8, "int4": 4}
_TRIED_TOKENS, _TRIED_START = 70, 1000  # more than a group, not a multiple of anything


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coded:
    """KV ``[L, 2, T, H, D]`` of ``dtype``, written by ``codec`` as the bytes ``data``: uint8 on the CPU."""

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


Payload = Tensor | Coded  # a tensor is KV as it is: the codec "raw"


def codec_of(payload: Payload) -> str:
    return payload.codec if isinstance(payload, Coded) else RAW


def data_of(payload: Payload) -> Tensor:
    """What is stored, and what a checksum covers."""
    return payload.data if isinstance(payload, Coded) else payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """Writes chunks as ``name`` says and reads all codecs.

    Without a ``scheme`` the model's keys cannot be un-rotated, so nothing is quantised. Where KV is needed on
    a GPU, the ``device``, quantised KV comes there once :meth:`prepare` has found that this works.
    """

    name: CodecName = RAW
    scheme: RotaryScheme | None = None
    device: torch.device | None = None

    def encode(self, kv_L2THD: Tensor, start: int) -> Payload:
        """KV that was computed at positions from ``start`` on -> what is stored of it.

        What cannot be quantised (numbers beyond float16's range) is stored as it is.
        """
        base, _, packing = self.name.partition("+")
        data_N: Tensor | None = None
        if base in _BITS and self.scheme is not None and kv_L2THD.dtype.itemsize > 1:
            data_N = _quantised(kv_L2THD, start, self.scheme, _BITS[base])
        if data_N is None:
            base, data_N = RAW, kv_L2THD
        if base == RAW and not packing:
            return kv_L2THD
        if packing:
            item_bytes = kv_L2THD.element_size() if base == RAW else 1
            data_N = compress(data_N.contiguous().flatten().view(torch.uint8), item_bytes)
        name = f"{base}+{packing}" if packing else base
        return Coded(codec=name, dtype=kv_L2THD.dtype, shape=tuple(kv_L2THD.shape), data=data_N)

    def decode(self, payload: Payload, start: int) -> Tensor:
        """KV ``[L, 2, T, H, D]`` at positions from ``start`` on; raises :class:`CorruptChunkError`."""
        if isinstance(payload, Tensor):
            return payload
        base, _, packing = payload.codec.partition("+")
        data, shape = payload.data, payload.shape
        if base != RAW and not (len(shape) == 5 and shape[1] == 2 and min(shape) > 0):
            raise CorruptChunkError(f"{payload.codec} of {list(shape)}, which is not [L, 2, T, H, D]")
        num_bytes = coded_bytes(base, shape, payload.dtype)
        if packing:
            data = decompress(data, payload.dtype.itemsize if base == RAW else 1, num_bytes)
        if data.numel() != num_bytes:
            raise CorruptChunkError(f"{data.numel()} bytes of {payload.codec} do not hold {list(shape)}")
        if base == RAW:
            return data.view(payload.dtype).view(shape)
        if self.scheme is None:
            raise StorageError(
                f"a chunk stored as {payload.codec} needs the model's rotary embedding, which is not known"
            )
        return self._dequantised(replace(payload, data=data), start, self.scheme, _BITS[base])

    def prepare(self, dtype: torch.dtype, num_heads: int, head_dim: int) -> None:
        """Do now what would delay the first :meth:`decode` of such KV; raises whatever a compiler raises."""
        base = self.name.partition("+")[0]
        if base not in _BITS or self.scheme is None or not self.scheme.neox:
            return
        if dequantise_kernel.writes(dtype):
            dequantise_kernel.compiled(_BITS[base])
        if self.device is not None:
            shape = (2, 2, _TRIED_TOKENS, num_heads, head_dim)
            kv_L2THD = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            data_N = _quantised(kv_L2THD, 0, self.scheme, _BITS[base])
            assert data_N is not None  # so small numbers have a scale
            coded = Coded(codec=base, dtype=dtype, shape=shape, data=data_N)
            found = _on_device(coded, _TRIED_START, self.scheme, _BITS[base], self.device)
            expected = _on_cpu(coded, _TRIED_START, self.scheme, _BITS[base])
            tried_kernels.judge(dequantise_gpu.kernel(_BITS[base]), found, expected)

    def _dequantised(self, coded: Coded, start: int, scheme: RotaryScheme, bits: int) -> Tensor:
        device, kernel = self.device, dequantise_gpu.kernel(bits)
        if device is not None and scheme.neox and tried_kernels.works(kernel, coded.dtype, device):
            with suppress(torch.OutOfMemoryError):  # the engine needs the GPU's memory more
                return _on_device(coded, start, scheme, bits, device)
        return _on_cpu(coded, start, scheme, bits)


PLAIN = Codec()


def coded_bytes(base: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of KV of that shape before compression."""
    if base == RAW:
        return math.prod(shape) * dtype.itemsize
    return sum(layout.num_bytes for layout in _layouts(shape, _BITS[base]))


def _layouts(shape: tuple[int, ...], bits: int) -> tuple[Layout, Layout]:
    """Keys channel by channel, values token by token: the last dimension is what groups are made of."""
    L, _, T, H, D = shape
    return Layout((L, H, D, T), bits), Layout((L, T, H * D), bits)


def _quantised(kv_L2THD: Tensor, start: int, scheme: RotaryScheme, bits: int) -> Tensor | None:
    keys_LHDT = unrotate_keys(kv_L2THD[:, 0], start, scheme).permute(0, 2, 3, 1)
    values_LTV = kv_L2THD[:, 1].float().flatten(-2)
    try:
        return torch.cat([quantise(keys_LHDT, bits), quantise(values_LTV, bits)])
    except OverflowError:
        return None


def _on_cpu(coded: Coded, start: int, scheme: RotaryScheme, bits: int) -> Tensor:
    keys, values = _layouts(coded.shape, bits)
    of_keys, of_values = coded.data[: keys.num_bytes], coded.data[keys.num_bytes :]
    if scheme.neox and dequantise_kernel.serves(coded.shape, coded.dtype, scheme.rotary_dim, coded.data):
        return dequantise_kernel.dequantised(
            Quantised(keys, of_keys),
            Quantised(values, of_values),
            *turns_of(start, coded.shape[2], scheme),
        )
    keys_LTHD = dequantise(of_keys, keys.shape, bits).permute(0, 3, 1, 2)
    kv_L2THD = torch.empty(coded.shape, dtype=coded.dtype)
    kv_L2THD[:, 0] = place_keys(keys_LTHD, start, scheme)
    kv_L2THD[:, 1] = dequantise(of_values, values.shape, bits).view_as(kv_L2THD[:, 1])
    return kv_L2THD


def _on_device(coded: Coded, start: int, scheme: RotaryScheme, bits: int, device: torch.device) -> Tensor:
    turns = turns_of(start, coded.shape[2], scheme)
    return dequantise_gpu.dequantised(coded.data, _layouts(coded.shape, bits), coded.dtype, turns, device)
