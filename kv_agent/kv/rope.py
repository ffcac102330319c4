"""Rotary embedding as a movable thing: read a model's scheme from its table, rotate or un-rotate keys.

A key at position ``p`` is its plain key turned by ``p * inv_freq[i]`` radians in plane ``i``. When that
holds at every position, a key computed at one position is moved to another by turning it by the difference.

Legend: P table positions, R rotary dim, F = R / 2 planes, T tokens, H kv heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv import rotation_gpu, rotation_kernel

# A float32 table multiplies position by frequency in float32, so its angle error grows with the angle:
# a few roundings of 2**-24, relative. 2**-21 leaves room for position scaling, magnitude and GPU sin/cos.
_TOLERANCE = 2.0**-21
_KNOWN_TURNS = 4096  # distances whose cosines and sines are kept: chunks of one plan mostly move alike
_TRIED_DELTA = 1000
_BLOCK_ROWS = 4096  # float64 work is done in blocks, so a table of 128k positions needs no 100s of MB


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryScheme:
    """Frequencies in radians per position, one per plane.

    ``neox``: plane ``i`` is dims ``(i, i + rotary_dim / 2)``; otherwise (GPT-J) dims ``(2 i, 2 i + 1)``.
    Dims from ``rotary_dim`` on are not rotated.
    """

    inv_freq: tuple[float, ...]
    rotary_dim: int
    neox: bool

    def __post_init__(self) -> None:
        if self.rotary_dim != 2 * len(self.inv_freq) or not self.inv_freq:
            raise ValueError(f"rotary_dim {self.rotary_dim} needs half as many, got {len(self.inv_freq)}")


def scheme_from_table(cos_sin_PR: Tensor, *, neox: bool) -> RotaryScheme:
    """Recover the scheme from vLLM's float32 table ``cat(cos, sin)``, times a constant magnitude if any.

    The table must be the float32 one, before vLLM casts it to the model's dtype. Raises
    :class:`UnsupportedModelError` if any row is not what position times frequency gives.
    """
    if cos_sin_PR.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the rotary table must be float32, got {cos_sin_PR.dtype}")
    if cos_sin_PR.ndim != 2 or cos_sin_PR.shape[0] < 2 or cos_sin_PR.shape[1] < 2 or cos_sin_PR.shape[1] % 2:
        raise ValueError(f"the rotary table must be [positions >= 2, even], got {list(cos_sin_PR.shape)}")
    table_PR = cos_sin_PR.detach().cpu()
    inv_freq_F = _unwrap(table_PR)
    _check_linear(table_PR, inv_freq_F)
    return RotaryScheme(inv_freq=tuple(inv_freq_F.tolist()), rotary_dim=table_PR.shape[1], neox=neox)


def rotate_keys(k_THD: Tensor, delta: int, scheme: RotaryScheme) -> Tensor:
    """The keys as if every position were ``delta`` higher -> same shape and dtype, a new tensor.

    Leading dims are free. ``delta == 0`` returns ``k_THD`` itself. Arithmetic is float32, rounded once.
    """
    _check_head_dim(k_THD, scheme)
    if delta == 0:
        return k_THD
    moved_THD = torch.empty(k_THD.shape, dtype=k_THD.dtype, device=k_THD.device)
    copy_rotated_into(moved_THD, k_THD, delta, scheme)
    return moved_THD


def copy_rotated_into(out_THD: Tensor, k_THD: Tensor, delta: int, scheme: RotaryScheme) -> None:
    """Write what :func:`rotate_keys` gives into ``out_THD``: same shape and dtype, no memory shared."""
    _check_head_dim(k_THD, scheme)
    if delta == 0:
        out_THD.copy_(k_THD)
        return
    if scheme.neox and rotation_kernel.fits(out_THD, k_THD):
        rotation_kernel.rotate_into(out_THD, k_THD, *_turn(delta, scheme))
        return
    if scheme.neox and rotation_gpu.fits(out_THD, k_THD):
        rotation_gpu.rotate_into(out_THD, k_THD, *_turn(delta, scheme))
        return
    out_THD[..., : scheme.rotary_dim] = _rotate(k_THD, _angles(float(delta), scheme), scheme)
    out_THD[..., scheme.rotary_dim :] = k_THD[..., scheme.rotary_dim :]


@lru_cache(_KNOWN_TURNS)
def _turn(delta: int, scheme: RotaryScheme) -> tuple[Tensor, Tensor]:
    angles_F = _angles(float(delta), scheme)
    return angles_F.cos().float(), angles_F.sin().float()


def prepare_rotation(scheme: RotaryScheme, dtype: torch.dtype, device: torch.device) -> None:
    """Do now what would delay the first rotation of such keys; raises whatever a compiler raises."""
    if scheme.neox and rotation_kernel.serves(dtype, device):
        rotation_kernel.compiled()
    elif scheme.neox and device.type == "cuda":
        shape = (2, 3, 2, scheme.rotary_dim + 2)
        k_LTHD = torch.linspace(-300.0, 300.0, math.prod(shape), device=device).view(shape).to(dtype)
        by_torch_LTHD = rotate_keys(k_LTHD, _TRIED_DELTA, scheme)
        rotation_gpu.prepare(k_LTHD, *_turn(_TRIED_DELTA, scheme), by_torch_LTHD)


def unrotate_keys(k_THD: Tensor, start: int, scheme: RotaryScheme) -> Tensor:
    """The keys before rotation, when token ``t`` stands at position ``start + t`` -> same shape, float32.

    Leading dims are free. A constant magnitude in the model's table (YaRN) stays in the result.
    """
    return _turned_by_position(k_THD, start, -1, scheme)


def place_keys(plain_THD: Tensor, start: int, scheme: RotaryScheme) -> Tensor:
    """Inverse of :func:`unrotate_keys` -> same shape, float32."""
    return _turned_by_position(plain_THD, start, 1, scheme)


def turns_of(start: int, num_tokens: int, scheme: RotaryScheme) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, F]``, float32, by which :func:`place_keys` turns so many tokens."""
    return turns_by(range(start, start + num_tokens), scheme)


def turns_by(distances: Sequence[int], scheme: RotaryScheme) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, F]``, float32, that move keys by so many positions."""
    angles_NF = _angles(torch.tensor(distances, dtype=torch.float64)[:, None], scheme)
    return angles_NF.cos().float(), angles_NF.sin().float()


def _turned_by_position(k_THD: Tensor, start: int, sign: int, scheme: RotaryScheme) -> Tensor:
    _check_head_dim(k_THD, scheme)
    positions_T = _positions(start, k_THD.shape[-3])
    angles_T1F = _angles(sign * positions_T[:, None, None], scheme)
    turned_THD = k_THD.to(torch.float32, copy=True)
    turned_THD[..., : scheme.rotary_dim] = _rotate(k_THD, angles_T1F, scheme)
    return turned_THD


def _positions(start: int, num_tokens: int) -> Tensor:
    return torch.arange(start, start + num_tokens, dtype=torch.float64)


def _check_head_dim(k_THD: Tensor, scheme: RotaryScheme) -> None:
    if k_THD.ndim < 3 or k_THD.shape[-1] < scheme.rotary_dim:
        raise ValueError(f"keys {list(k_THD.shape)} are not [..., T, H, D >= {scheme.rotary_dim}]")


def _angles(position: float | Tensor, scheme: RotaryScheme) -> Tensor:
    """``position * inv_freq`` in float64 on the CPU -> [..., F] (not every device has float64)."""
    return position * torch.tensor(scheme.inv_freq, dtype=torch.float64)


def _rotate(k_THD: Tensor, angles_F: Tensor, scheme: RotaryScheme) -> Tensor:
    """Turn the rotary dims by ``angles_F``, broadcast to [..., T, H, F] -> [..., T, H, R], float32."""
    x_THR = k_THD[..., : scheme.rotary_dim].float()
    cos_F = angles_F.cos().to(x_THR.device, torch.float32)
    sin_F = angles_F.sin().to(x_THR.device, torch.float32)
    if scheme.neox:
        a_THF, b_THF = x_THR.chunk(2, dim=-1)
    else:
        a_THF, b_THF = x_THR[..., ::2], x_THR[..., 1::2]
    turned_a_THF = a_THF * cos_F - b_THF * sin_F
    turned_b_THF = b_THF * cos_F + a_THF * sin_F
    if scheme.neox:
        return torch.cat((turned_a_THF, turned_b_THF), dim=-1)
    return torch.stack((turned_a_THF, turned_b_THF), dim=-1).flatten(-2)  # [..., F, 2] -> [..., R]


class _Polar(NamedTuple):
    """Some rows of a table as angle and magnitude; all float64."""

    positions_N1: Tensor
    angle_NF: Tensor
    magnitude_NF: Tensor


def _polar(table_PR: Tensor, start: int, end: int) -> _Polar:
    cos_NF, sin_NF = table_PR[start:end].double().chunk(2, dim=-1)
    positions_N1 = torch.arange(start, start + cos_NF.shape[0], dtype=torch.float64)[:, None]
    return _Polar(positions_N1, torch.atan2(sin_NF, cos_NF), torch.hypot(cos_NF, sin_NF))


def _blocks(table_PR: Tensor) -> Iterator[_Polar]:
    for start in range(0, table_PR.shape[0], _BLOCK_ROWS):
        yield _polar(table_PR, start, start + _BLOCK_ROWS)


def _wrap(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi]."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _unwrap(table_PR: Tensor) -> Tensor:
    """Frequencies -> [F], float64: known from position ``p``, the angle at ``2 p`` can be unwrapped.

    Powers of two are also where the model's float32 product of position and frequency is exact.
    """
    inv_freq_F = torch.zeros(table_PR.shape[1] // 2, dtype=torch.float64)
    position = 1
    while position < table_PR.shape[0]:
        row = _polar(table_PR, position, position + 1)
        inv_freq_F = inv_freq_F + _wrap(row.angle_NF[0] - position * inv_freq_F) / position
        position *= 2
    return inv_freq_F


def _check_linear(table_PR: Tensor, inv_freq_F: Tensor) -> None:
    magnitude = _polar(table_PR, 0, 1).magnitude_NF[0, 0]
    for block in _blocks(table_PR):
        expected_NF = block.positions_N1 * inv_freq_F
        error_NF = _wrap(block.angle_NF - expected_NF).abs()
        linear = (error_NF <= _TOLERANCE * (1 + expected_NF.abs())).all()
        constant = ((block.magnitude_NF - magnitude).abs() < _TOLERANCE * magnitude).all()
        if not (linear and constant):  # NaN fails both
            first = int(block.positions_N1[0])
            raise UnsupportedModelError(
                f"the model's rotary embedding is not position-linear "
                f"(seen within {_BLOCK_ROWS} positions from {first})"
            )
