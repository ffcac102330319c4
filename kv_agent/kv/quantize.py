"""Few bits a number: linear quantisation in groups along the last dimension. Pure tensor functions.

A number is ``(code + low) * scale``. A group has one byte for its scale and, with 4 bits, another for its
lowest number in steps, so that no codes are wasted where all numbers of a group have one sign; with 8 bits
``low`` is -127. Keys are quantised per channel and values per token, as in KIVI (Liu et al., 2024); who does
that turns the tensor so that what a group spans comes last.

Legend: N numbers of the last dimension, G groups of it, S numbers in a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # numbers in a group, about: all groups of a row have one size
FEW_BITS = 4
LOW_OF_8_BITS = -127.0

# A scale is 2 ** ((byte - 168) / 6): from 4e-9 to 2e4 in steps of 12 %, and rounded up. Text is short, so
# scales of two bytes would be a tenth of what a small chunk takes.
_STEPS_PER_OCTAVE, _SCALE_ONE = 6, 168
SCALES = torch.tensor([2.0 ** ((byte - _SCALE_ONE) / _STEPS_PER_OCTAVE) for byte in range(256)])
_MOST_LOW = 127


@dataclass(frozen=True, slots=True)
class Layout:
    """How many bytes quantised numbers take: ``[..., N]`` in ``bits`` bits, 4 or 8."""

    shape: tuple[int, ...]
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (FEW_BITS, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")

    @property
    def groups_GS(self) -> tuple[int, int]:
        num_groups = max(1, round(self.shape[-1] / GROUP))
        return num_groups, -(-self.shape[-1] // num_groups)

    @property
    def grouped(self) -> tuple[int, ...]:
        """``[..., G, S]``; the last group of a row may be padded."""
        return (*self.shape[:-1], *self.groups_GS)

    @property
    def code_bytes(self) -> int:
        return -(-math.prod(self.grouped) * self.bits // 8)

    @property
    def num_groups(self) -> int:
        """Of all rows together; each has a byte of scale."""
        return math.prod(self.grouped[:-1])

    @property
    def num_bytes(self) -> int:
        return self.code_bytes + self.num_groups * (2 if self.bits == FEW_BITS else 1)


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """What :func:`quantise` gave of numbers so laid out; raises ``ValueError`` where that is other bytes."""

    layout: Layout
    data: Tensor

    def __post_init__(self) -> None:
        if self.data.numel() != self.layout.num_bytes:
            raise ValueError(
                f"{self.data.numel()} bytes are not the {self.layout.num_bytes} of {list(self.layout.shape)}"
            )

    @property
    def codes(self) -> Tensor:
        """Uint8, of two codes each with 4 bits, the lower half first."""
        return self.data[: self.layout.code_bytes]

    @property
    def scales(self) -> Tensor:
        """Uint8, one of each group: places in ``SCALES``."""
        return self.data[self.layout.code_bytes :][: self.layout.num_groups]

    @property
    def lows(self) -> Tensor:
        """Int8, one of each group with 4 bits; with 8 there are none."""
        return self.data[self.layout.code_bytes + self.layout.num_groups :].view(torch.int8)


def quantise(x_N: Tensor, bits: int) -> Tensor:
    """Float32 ``[..., N]`` -> uint8 ``[Layout.num_bytes]``: codes, scales and, with 4 bits, lowest numbers.

    Raises :class:`OverflowError` where a number is too large for any scale, or none, as NaN.
    """
    layout = Layout(tuple(x_N.shape), bits)
    x_GS = _padded(x_N, layout)
    most = 2 ** (bits - 1) - 1
    if bits == FEW_BITS:
        low_G1, high_G1 = x_GS.amin(-1, keepdim=True), x_GS.amax(-1, keepdim=True)
        # Rounding the lowest number to a step may take half a step at either end.
        wanted_G1 = torch.maximum((high_G1 - low_G1) / (2**bits - 2), low_G1.abs() / _MOST_LOW)
        scales_G1 = _scale_bytes(wanted_G1)
        scale_G1 = SCALES[scales_G1.int()]
        lows_G1 = (low_G1 / scale_G1).round_().clamp_(-_MOST_LOW, _MOST_LOW)
    else:
        scales_G1 = _scale_bytes(x_GS.abs().amax(-1, keepdim=True) / most)
        scale_G1, lows_G1 = SCALES[scales_G1.int()], torch.tensor(LOW_OF_8_BITS)
    codes = ((x_GS / scale_G1).round_() - lows_G1).clamp_(0, 2**bits - 1).to(torch.uint8).flatten()
    if bits == 8:
        return torch.cat([codes, scales_G1.flatten()])
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    packed = codes[::2] | codes[1::2] << 4
    return torch.cat([packed, scales_G1.flatten(), lows_G1.to(torch.int8).flatten().view(torch.uint8)])


def dequantise(data: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Inverse of :func:`quantise` -> float32 ``shape``, each number within half a step of what it was."""
    layout = Layout(shape, bits)
    quantised = Quantised(layout, data)
    codes, low_G1 = quantised.codes, torch.tensor(LOW_OF_8_BITS)
    if bits == FEW_BITS:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten()[: math.prod(layout.grouped)]
        low_G1 = quantised.lows.float().view(*layout.grouped[:-1], 1)
    scale_G1 = SCALES[quantised.scales.int()].view(*layout.grouped[:-1], 1)
    x_GS = codes.view(layout.grouped).float().add_(low_G1).mul_(scale_G1)
    x_N: Tensor = x_GS.flatten(-2)[..., : shape[-1]]
    return x_N


def _scale_bytes(wanted: Tensor) -> Tensor:
    """The smallest scales that are at least ``wanted``, as bytes."""
    if not (wanted <= SCALES[-1]).all():  # NaN is not
        raise OverflowError(f"numbers are too large to be quantised by steps of {SCALES[-1]}, or none")
    return torch.bucketize(wanted, SCALES).to(torch.uint8)


def _padded(x_N: Tensor, layout: Layout) -> Tensor:
    """``[..., N]`` -> ``[..., G, S]``; padding repeats the last number, so it widens no range."""
    num_groups, size = layout.groups_GS
    num_missing = num_groups * size - x_N.shape[-1]
    if num_missing:
        x_N = torch.cat([x_N, x_N[..., -1:].expand(*x_N.shape[:-1], num_missing)], dim=-1)
    return x_N.reshape(layout.grouped)
