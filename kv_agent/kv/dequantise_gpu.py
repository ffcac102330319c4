"""KV from few bits a number on a GPU: what crosses the bus are the few bits, and Triton makes KV of them.

On a stream of its own, so that it does not wait for what the model computes. Not run on a GPU yet.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kv_agent.kv.quantize import Layout, Quantised


def kernel(bits: int) -> str:
    """What :mod:`kv_agent.kv.tried_kernels` knows it as."""
    return f"numbers of {bits} bits"


def dequantised(
    data: Tensor,
    layouts: tuple[Layout, Layout],
    dtype: torch.dtype,
    turns: tuple[Tensor, Tensor],
    device: torch.device,
) -> Tensor:
    """``data`` holds keys ``[L, H, D, T]`` and behind them values ``[L, T, H D]`` -> KV of ``dtype``, there.

    Keys are turned in the planes ``(i, i + F)`` by cosines and sines ``[T, F]``, float32. All is done when
    this returns. Raises whatever Triton raises, and what torch does when the device's memory is full.
    """
    from kv_agent.kv import dequantise_triton  # takes a while, and needs Triton

    (L, H, D, T), (_, F) = layouts[0].shape, turns[0].shape
    if (
        min(L, H, D, T, F, D - 2 * F + 1) <= 0
        or layouts[1] != Layout((L, T, H * D), layouts[0].bits)
        or not turns[0].shape == turns[1].shape == (T, F)
        or data.numel() != sum(layout.num_bytes for layout in layouts)
    ):
        raise ValueError(f"{data.numel()} bytes of {layouts} and turns {list(turns[0].shape)} differ")
    module: Any = torch.get_device_module(device)
    stream = _stream(device)
    with module.stream(stream):
        there = _on(device, data)
        kv_L2THD = torch.empty((L, 2, T, H, D), dtype=dtype, device=device)
        dequantise_triton.write(
            kv_L2THD,
            Quantised(layouts[0], there[: layouts[0].num_bytes]),
            Quantised(layouts[1], there[layouts[0].num_bytes :]),
            *(_on(device, turn) for turn in turns),
        )
        is_done = module.Event()
        is_done.record(stream)
    is_done.synchronize()
    return kv_L2THD


@cache
def _stream(device: torch.device) -> Any:
    module: Any = torch.get_device_module(device)
    return module.Stream(device)


def _on(device: torch.device, x: Tensor) -> Tensor:
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)
