"""Triton's kernels, run by its interpreter on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module

import pytest

import kv_agent.kv
from kv_agent.kv import tried_kernels

KERNELS = ("triton_numbers", "rotation_triton", "dequantise_triton")


def forget_kernels() -> None:
    for name in KERNELS:
        sys.modules.pop(f"kv_agent.kv.{name}", None)
        vars(kv_agent.kv).pop(name, None)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Whoever imports kernels gets them as Triton makes them for its interpreter."""
    import_module("triton")  # first, for not all that is in there can be interpreted
    forget_kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in KERNELS:
            import_module(f"kv_agent.kv.{name}")
    yield
    forget_kernels()


@pytest.fixture
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried_kernels, "_works", set())
