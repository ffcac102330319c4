"""Which kernels for a GPU may be used: those that gave what torch gives when an engine started.

None of them has been run on a GPU yet. Where Triton does not work, or gives something else than torch, torch
does their work.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_works: set[tuple[str, torch.dtype, torch.device]] = set()


def works(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    return (kernel, dtype, device) in _works


def judge(kernel: str, found: Tensor, by_torch: Tensor) -> None:
    """Use the kernel from now on for such numbers on that device if both are the same, bit for bit."""
    if torch.equal(found, by_torch.to(found.device)):
        _works.add((kernel, found.dtype, found.device))
        return
    about = {"event": "kernel_unavailable"}
    logger.warning(
        "Triton's kernel for %s is left alone, for it differs from torch on %s",
        kernel,
        found.device,
        extra=about,
    )
