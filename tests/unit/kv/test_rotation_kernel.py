"""The one pass over bfloat16 keys gives what torch gives in many, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.kv import rotation_kernel
from kv_agent.kv.rope import RotaryScheme, copy_rotated_into, rotate_keys


def scheme_of(rotary_dim: int) -> RotaryScheme:
    inv_freq = tuple(1e6 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))
    return RotaryScheme(inv_freq=inv_freq, rotary_dim=rotary_dim, neox=True)


def by_torch(k_THD: Tensor, delta: int, scheme: RotaryScheme, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(rotation_kernel, "fits", lambda *_: False)
        return rotate_keys(k_THD, delta, scheme)


def random_bits(*shape: int, seed: int) -> Tensor:
    """Every kind of number: denormal, huge, infinite, NaN."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16).view(
        torch.bfloat16
    )


def require_same(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int16)[~found.isnan()], expected.view(torch.int16)[~found.isnan()])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    rotary_dim=st.sampled_from([2, 6, 16, 48, 64]),
    rest=st.sampled_from([0, 1, 7]),
    skip=st.integers(0, 3),
    delta=st.integers(-40_000, 40_000).filter(bool),
    is_random=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_keys_are_rotated_as_torch_rotates_them(
    shape: tuple[int, int, int],
    rotary_dim: int,
    rest: int,
    skip: int,
    delta: int,
    is_random: bool,
    seed: int,
) -> None:
    L, T, H = shape
    scheme = scheme_of(rotary_dim)
    full = (L, 2, skip + T, H, rotary_dim + rest)
    kv_L2THD = random_bits(*full, seed=seed) if is_random else torch.randn(full).bfloat16()
    out_L2THD = torch.full((L, 2, T + 3, H, rotary_dim + rest), 5.0, dtype=torch.bfloat16)
    k_LTHD, out_LTHD = kv_L2THD[:, 0, skip:], out_L2THD[:, 0, 1 : 1 + T]
    before = kv_L2THD.clone()
    assert rotation_kernel.fits(out_LTHD, k_LTHD)

    copy_rotated_into(out_LTHD, k_LTHD, delta, scheme)

    with pytest.MonkeyPatch.context() as patch:
        require_same(out_LTHD, by_torch(k_LTHD, delta, scheme, patch))
    assert (out_L2THD[:, 1] == 5).all()
    assert (out_L2THD[:, 0, [0, *range(1 + T, T + 3)]] == 5).all()
    assert torch.equal(kv_L2THD.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("num_planes", [1, 16, 24])  # one by one, as vectors, both
def test_every_bfloat16_number_is_rounded_as_torch_rounds_it(
    num_planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = -(-(1 << 16) // num_planes)
    every = torch.arange(num_rows * num_planes).to(torch.int16).view(torch.bfloat16)
    halves = every.view(num_rows, num_planes), random_bits(num_rows, num_planes, seed=3)
    k_LTHD = torch.cat(halves, dim=-1).view(1, num_rows, 1, 2 * num_planes)
    scheme = scheme_of(2 * num_planes)

    for delta in (1, -3, 1000):
        require_same(rotate_keys(k_LTHD, delta, scheme), by_torch(k_LTHD, delta, scheme, monkeypatch))


@pytest.mark.parametrize(
    "k_LTHD",
    [
        torch.randn(2, 3, 2, 8),
        torch.randn(2, 3, 2, 8).half(),
        torch.randn(3, 2, 8).bfloat16(),
        torch.randn(2, 2, 3, 8).bfloat16().transpose(1, 2),
        torch.randn(2, 0, 2, 8).bfloat16(),
    ],
    ids=["float32", "float16", "one layer", "heads before tokens", "no tokens"],
)
def test_other_keys_are_left_to_torch(k_LTHD: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation_kernel, "rotate_into", None)

    moved = rotate_keys(k_LTHD, 7, scheme_of(8))

    assert moved.dtype == k_LTHD.dtype
    assert torch.equal(moved, rotate_keys(k_LTHD.float(), 7, scheme_of(8)).to(k_LTHD.dtype))
