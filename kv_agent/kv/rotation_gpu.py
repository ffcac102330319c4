"""Whether keys on a GPU are rotated by Triton in one pass; torch takes a dozen.

It has not been run on a GPU yet. So it is tried when an engine starts, and left alone where Triton does not
work or gives something else than torch.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_works: set[tuple[torch.dtype, torch.device]] = set()  # where it has been tried


def fits(out_THD: Tensor, k_THD: Tensor) -> bool:
    """Whether :func:`rotate_into` takes them: where it works, one run of rows per leading index."""
    return (k_THD.dtype, k_THD.device) in _works and all(
        x.ndim == 4 and x.numel() > 0 and x[0].is_contiguous() for x in (out_THD, k_THD)
    )


def rotate_into(out_THD: Tensor, k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> None:
    """Write the keys ``[N, T, H, D]`` turned in the planes ``(i, i + F)``; the dims beyond as they are."""
    from kv_agent.kv import rotation_triton  # takes a while, and needs Triton

    rotation_triton.rotate_into(out_THD, k_THD, cos_F, sin_F)


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Compare it with torch there; where they agree it is used from now on. Raises whatever Triton raises."""
    k_THD = torch.linspace(-300.0, 300.0, 2 * 3 * 2 * 10, device=device).view(2, 3, 2, 10).to(dtype)
    angles_F = torch.arange(1.0, 5.0)
    cos_F, sin_F = angles_F.cos(), angles_F.sin()
    out_THD = torch.empty_like(k_THD)
    rotate_into(out_THD, k_THD, cos_F, sin_F)
    a_THF, b_THF, rest = k_THD[..., :4].float(), k_THD[..., 4:8].float(), k_THD[..., 8:]
    cos_F, sin_F = cos_F.to(device), sin_F.to(device)
    turned = torch.cat((a_THF * cos_F - b_THF * sin_F, b_THF * cos_F + a_THF * sin_F), dim=-1)
    if torch.equal(out_THD, torch.cat((turned.to(dtype), rest), dim=-1)):
        _works.add((dtype, k_THD.device))
    else:
        about = {"event": "kernel_unavailable"}
        logger.warning("keys are rotated without Triton, which differs from torch on %s", device, extra=about)
