"""Numbers in few bits: how far they are from what they were, and how many bytes that takes."""

# N numbers of a row

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.kv.quantize import GROUP, Layout, dequantise, quantise

STEP_BETWEEN_SCALES = 2 ** (1 / 6)
SMALLEST_SCALE = 2.0 ** (-168 / 6)


def allowed_error(row: list[float], bits: int) -> float:
    """Half the largest step a group of these numbers may get, by the definition alone."""
    of_4_bits = max((max(row) - min(row)) / 14, abs(min(row)) / 127)
    wanted = max(map(abs, row)) / 127 if bits == 8 else of_4_bits
    return 0.5 * max(wanted * STEP_BETWEEN_SCALES, SMALLEST_SCALE) * 1.001


def there_and_back(x: Tensor, bits: int) -> Tensor:
    return dequantise(quantise(x, bits), tuple(x.shape), bits)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(-1e4, 1e4, width=32), min_size=size, max_size=size), min_size=1, max_size=6
        )
    ),
    bits=st.sampled_from([4, 8]),
)
def test_every_number_is_within_half_a_step(rows: list[list[float]], bits: int) -> None:
    found = there_and_back(torch.tensor(rows), bits)
    for row, numbers in zip(rows, found.tolist(), strict=True):
        for number, read in zip(row, numbers, strict=True):
            assert abs(number - read) <= allowed_error(row, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 31, 64, 65, 95, 96, 97, 200, 513])
def test_rows_of_any_length_are_cut_into_groups_of_one_size(size: int, bits: int) -> None:
    x_RN = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(size))
    layout = Layout((3, 5, size), bits)
    num_groups, group = layout.groups_GS
    assert group <= 1.5 * GROUP
    assert num_groups * group - size < num_groups
    data = quantise(x_RN, bits)
    assert data.dtype == torch.uint8
    assert data.shape == (layout.num_bytes,)
    found = dequantise(data, (3, 5, size), bits)
    for row, numbers in zip(x_RN.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        for start in range(0, size, group):
            part, read = row[start : start + group], numbers[start : start + group]
            worst = max(abs(a - b) for a, b in zip(part, read, strict=True))
            assert worst <= allowed_error(part, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_all_zero_stays_so(bits: int) -> None:
    assert not there_and_back(torch.zeros(4, 70), bits).any()


def test_four_bits_are_not_wasted_on_a_sign() -> None:
    offset_N = 100 + torch.rand(64, generator=torch.Generator().manual_seed(0))
    error = (there_and_back(offset_N, 4) - offset_N).abs().max()
    assert error < 0.5  # 101 / 127 is a step; codes around zero would make it 14 / 2


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_has_no_scale_is_refused(number: float, bits: int) -> None:
    with pytest.raises(OverflowError, match="too large"):
        quantise(torch.tensor([0.0, number, 1.0]), bits)


def test_bytes_of_another_shape_are_refused() -> None:
    data = quantise(torch.ones(2, 8), 8)
    with pytest.raises(ValueError, match="18 bytes are not the"):
        dequantise(data, (2, 9), 8)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        Layout((2, 8), 3)
