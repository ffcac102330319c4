"""Rotary arithmetic against complex numbers, and schemes against tables built from the published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.errors import UnsupportedModelError
from kv_agent.kv.rope import RotaryScheme, rotate_keys, scheme_from_table, unrotate_keys


def default_inv_freq(base: float, rotary_dim: int) -> Tensor:
    return 1.0 / (base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim))


def llama3_inv_freq(base: float, rotary_dim: int) -> Tensor:
    """Factor 8, low 1, high 4, original length 8192: wavelengths below 2048 stay, above 8192 shrink by 8."""
    out = []
    for freq in default_inv_freq(base, rotary_dim).tolist():
        wavelength = 2 * math.pi / freq
        smooth = min(1.0, max(0.0, (8192 / wavelength - 1) / 3))
        out.append((1 - smooth) * freq / 8 + smooth * freq)
    return torch.tensor(out, dtype=torch.float)


def yarn_inv_freq(base: float, rotary_dim: int) -> Tensor:
    """Factor 4 over original length 2048, beta 32 and 1, as in the YaRN paper."""

    def dim_of(rotations: float) -> float:
        return rotary_dim * math.log(2048 / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(dim_of(32)), math.ceil(dim_of(1))
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    freq = default_inv_freq(base, rotary_dim)
    return freq / 4 * ramp + freq * (1 - ramp)


def table(inv_freq: Tensor, positions: int, *, divide: float = 1.0, magnitude: float = 1.0) -> Tensor:
    angles = torch.outer(torch.arange(positions, dtype=torch.float) / divide, inv_freq)
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1)


def complex_oracle(k: Tensor, positions: Tensor, scheme: RotaryScheme) -> Tensor:
    """Each plane as one complex number times ``exp(i p f)``, in float64; ``positions`` one per token."""
    out = k.double().clone()
    half = scheme.rotary_dim // 2
    for i, freq in enumerate(scheme.inv_freq):
        a, b = (i, i + half) if scheme.neox else (2 * i, 2 * i + 1)
        turn = torch.polar(torch.ones_like(positions, dtype=torch.float64), positions.double() * freq)
        z = torch.complex(out[..., a].clone(), out[..., b].clone()) * turn[:, None]
        out[..., a], out[..., b] = z.real, z.imag
    return out


def scheme(rotary_dim: int = 16, neox: bool = True, base: float = 1e4) -> RotaryScheme:
    inv_freq = tuple(default_inv_freq(base, rotary_dim).double().tolist())
    return RotaryScheme(inv_freq=inv_freq, rotary_dim=rotary_dim, neox=neox)


def keys(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


both_styles = pytest.mark.parametrize("neox", [True, False])


@both_styles
@pytest.mark.parametrize("head_dim", [16, 24])  # the whole head, and a head rotated in part
@pytest.mark.parametrize("delta", [1, -7, 1000, -4096, 131_071])
def test_rotating_is_multiplying_by_a_complex_number(neox: bool, head_dim: int, delta: int) -> None:
    k = keys(5, 2, head_dim)
    expected = complex_oracle(k, torch.full((5,), delta), scheme(neox=neox))
    torch.testing.assert_close(rotate_keys(k, delta, scheme(neox=neox)).double(), expected, rtol=0, atol=1e-6)


@both_styles
def test_unrotating_turns_each_token_back_by_its_own_position(neox: bool) -> None:
    plain = keys(9, 3, 20)
    rotated = complex_oracle(plain, torch.arange(100, 109), scheme(neox=neox))
    torch.testing.assert_close(unrotate_keys(rotated, 100, scheme(neox=neox)), plain, rtol=0, atol=1e-6)


@both_styles
@settings(max_examples=30, deadline=None)
@given(a=st.integers(-50_000, 50_000), b=st.integers(-50_000, 50_000))
def test_rotating_by_a_then_b_is_rotating_by_their_sum(neox: bool, a: int, b: int) -> None:
    k, s = keys(3, 2, 16, seed=abs(a) % 97), scheme(neox=neox)
    torch.testing.assert_close(
        rotate_keys(rotate_keys(k, a, s), b, s), rotate_keys(k, a + b, s), rtol=0, atol=2e-6
    )


@both_styles
def test_rotating_keeps_norms(neox: bool) -> None:
    k = keys(50, 2, 16)
    torch.testing.assert_close(rotate_keys(k, 12_345, scheme(neox=neox)).norm(dim=-1), k.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_move_by_zero_returns_the_same_tensor(dtype: torch.dtype) -> None:
    k = keys(4, 2, 16, dtype=dtype)
    assert rotate_keys(k, 0, scheme()) is k


def test_dims_past_the_rotary_dim_are_untouched_and_the_input_is_not_changed() -> None:
    k = keys(4, 2, 24, dtype=torch.bfloat16)
    before = k.clone()
    moved = rotate_keys(k, 77, scheme())
    assert torch.equal(moved[..., 16:], k[..., 16:])
    assert torch.equal(unrotate_keys(k, 5, scheme())[..., 16:], k[..., 16:].float())
    unrotate_keys(k.float(), 5, scheme())
    assert torch.equal(k, before)
    assert moved.dtype == torch.bfloat16


@both_styles
def test_bfloat16_keys_are_rounded_once(neox: bool) -> None:
    k = keys(200, 2, 16, dtype=torch.bfloat16)
    expected = complex_oracle(k, torch.full((200,), 999), scheme(neox=neox))
    error = (rotate_keys(k, 999, scheme(neox=neox)).double() - expected).abs()
    assert (error <= expected.abs() * 2.0**-8 + 1e-6).all()  # half of a 2**-7 step


@both_styles
def test_leading_dims_are_rotated_like_each_slice(neox: bool) -> None:
    k, s = keys(3, 2, 7, 2, 16), scheme(neox=neox)
    moved, plain = rotate_keys(k, 31, s), unrotate_keys(k, 31, s)
    for i in range(3):
        for j in range(2):
            assert torch.equal(moved[i, j], rotate_keys(k[i, j], 31, s))
            assert torch.equal(plain[i, j], unrotate_keys(k[i, j], 31, s))


def test_unrotated_keys_do_not_depend_on_where_they_stood() -> None:
    k, s = keys(6, 2, 16), scheme()
    torch.testing.assert_close(unrotate_keys(rotate_keys(k, 4000, s), 4010, s), unrotate_keys(k, 10, s))


def test_a_head_smaller_than_the_rotary_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="H, D >= 16"):
        rotate_keys(keys(2, 2, 8), 1, scheme())


@pytest.mark.parametrize("inv_freq", [default_inv_freq, llama3_inv_freq, yarn_inv_freq])
@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("positions", [512, 8192, 131_072])
def test_frequencies_are_recovered_from_the_table(
    inv_freq: Callable[[float, int], Tensor], base: float, positions: int
) -> None:
    true = inv_freq(base, 64)
    found = torch.tensor(scheme_from_table(table(true, positions), neox=True).inv_freq, dtype=torch.float64)
    assert ((found - true.double()).abs() * positions).max() < 2e-7  # worst angle error within the table


@pytest.mark.parametrize("divide", [3.0, 4.0])
def test_linear_scaling_and_magnitude_are_recovered(divide: float) -> None:
    true = default_inv_freq(1e4, 32)
    found = scheme_from_table(table(true, 4096, divide=divide, magnitude=1.1386), neox=False)
    expected = true.double() / divide
    torch.testing.assert_close(
        torch.tensor(found.inv_freq, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9
    )
    assert (found.rotary_dim, found.neox) == (32, False)


def test_planes_that_never_turn_are_recovered() -> None:
    true = default_inv_freq(1e4, 16) * torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert scheme_from_table(table(true, 300), neox=True).inv_freq[4:] == (0.0,) * 4


def test_a_table_at_a_chunk_s_own_positions_moves_like_the_model_would_compute_it() -> None:
    """What the recovered scheme is for: key at 20 moved by 900 equals the table's key at 920."""
    cos, sin = table(yarn_inv_freq(1e4, 16), 2048, magnitude=1.2).chunk(2, dim=-1)
    found = scheme_from_table(torch.cat((cos, sin), dim=-1), neox=True)
    plain = keys(1, 2, 16)
    half = torch.cat((-plain[..., 8:], plain[..., :8]), dim=-1)

    def at(position: int) -> Tensor:
        return plain * cos[position].repeat(2) + half * sin[position].repeat(2)

    torch.testing.assert_close(rotate_keys(at(20), 900, found), at(920), rtol=0, atol=5e-4)
    torch.testing.assert_close(unrotate_keys(at(20), 20, found), plain * 1.2, rtol=0, atol=1e-5)


def short_then_long() -> Tensor:
    """As longrope: other frequencies from the original length on."""
    short, long = default_inv_freq(1e4, 16), default_inv_freq(1e4, 16) / 4
    return torch.cat((table(short, 1000), table(long, 2000)[1000:]))


def restarting() -> Tensor:
    return torch.cat((table(default_inv_freq(1e4, 16), 256), table(default_inv_freq(1e4, 16), 256)))


def growing_base() -> Tensor:
    """As dynamic NTK computed anew at each length."""
    rows = [table(default_inv_freq(1e4 * (1 + p / 500), 16), p + 1)[p] for p in range(1000)]
    return torch.stack(rows)


def growing_magnitude() -> Tensor:
    return table(default_inv_freq(1e4, 16), 1000) * torch.linspace(1, 1.01, 1000)[:, None]


def one_bad_angle() -> Tensor:
    broken = table(default_inv_freq(1e4, 16), 5000)
    broken[4990] = broken[4991].clone()
    return broken


def with_nan() -> Tensor:
    broken = table(default_inv_freq(1e4, 16), 500)
    broken[300, 3] = math.nan
    return broken


@pytest.mark.parametrize(
    "build", [short_then_long, restarting, growing_base, growing_magnitude, one_bad_angle, with_nan]
)
def test_a_table_that_is_not_linear_in_position_is_refused(build: Callable[[], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not position-linear"):
        scheme_from_table(build(), neox=True)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(10, 15), torch.zeros(1, 16), torch.zeros(16), torch.zeros(10, 16, dtype=torch.bfloat16)],
)
def test_something_that_is_not_a_table_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="rotary table must be"):
        scheme_from_table(bad, neox=True)


def test_a_scheme_needs_one_frequency_per_plane() -> None:
    with pytest.raises(ValueError, match="half as many"):
        RotaryScheme(inv_freq=(1.0, 0.1), rotary_dim=6, neox=True)
