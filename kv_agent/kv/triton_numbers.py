"""Numbers as kernels of Triton load and store them; imports Triton.

bfloat16 comes as its bits and is widened and rounded by hand, for Triton's interpreter, which runs the same
code on the CPU, would cut it off where a GPU rounds.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def items(x: Tensor) -> Tensor:
    """The tensor as kernels take it, the same memory."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def power_of_two(count: int) -> int:
    """The next one, as Triton's ranges want; none of nothing."""
    return 1 << (count - 1).bit_length() if count else 0


@triton.jit
def widened(x, IS_BFLOAT16: tl.constexpr):
    if IS_BFLOAT16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  # Triton compiles one of both
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr, IS_BFLOAT16: tl.constexpr):
    """To the nearest, halves to the even one; a NaN rounded like a number could become infinite."""
    if IS_BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, upper, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)
    else:  # noqa: RET505
        return x.to(dtype)
