"""Whether keys on a GPU are rotated by Triton in one pass; torch takes a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from kv_agent.kv import tried_kernels

_KERNEL = "keys"


def fits(out_THD: Tensor, k_THD: Tensor) -> bool:
    """Whether :func:`rotate_into` takes them: where it works, one run of rows per leading index."""
    return tried_kernels.works(_KERNEL, k_THD.dtype, k_THD.device) and all(
        x.ndim == 4 and x.numel() > 0 and x[0].is_contiguous() for x in (out_THD, k_THD)
    )


def rotate_into(out_THD: Tensor, k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> None:
    """Write the keys ``[N, T, H, D]`` turned in the planes ``(i, i + F)``; the dims beyond as they are."""
    from kv_agent.kv import rotation_triton  # takes a while, and needs Triton

    rotation_triton.rotate_into(out_THD, k_THD, cos_F, sin_F)


def prepare(k_THD: Tensor, cos_F: Tensor, sin_F: Tensor, by_torch_THD: Tensor) -> None:
    """Turn these keys; if that is what torch made of them, such keys are turned here from now on.

    Raises whatever Triton raises.
    """
    out_THD = torch.empty_like(k_THD)
    rotate_into(out_THD, k_THD, cos_F, sin_F)
    tried_kernels.judge(_KERNEL, out_THD, by_torch_THD)
