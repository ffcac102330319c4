"""Triton's compiler, which makes code for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# NVIDIA's compute capabilities, as A100 and H100 have them.
_PROGRAM = """
import sys
from importlib import import_module
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton

for module, name, kinds, numbers in eval(sys.argv[1]):
    kernel = getattr(import_module("kv_agent.kv." + module), name)
    names = kernel.arg_names
    for capability in (80, 90):
        source = ASTSource(
            fn=kernel,
            signature=dict(zip(names, [*kinds, *["constexpr"] * len(numbers)], strict=True)),
            constexprs={(names.index(name),): value for name, value in numbers.items()},
        )
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
        assert "st.global" in made and "fma.rn.f32" not in made, (name, numbers)
"""


class Variant(NamedTuple):
    """A kernel whose arguments are of these kinds, then constants."""

    module: str
    kernel: str
    kinds: Sequence[str]
    constants: Mapping[str, int]


def require_they_compile(variants: Iterable[Variant]) -> None:
    """Nothing in them may be fused: torch rounds products, too.

    In a process of its own, for in this one there may be Triton's interpreter.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    about = repr([tuple(variant) for variant in variants])
    subprocess.run([sys.executable, "-c", _PROGRAM, about], check=True, env=environment)
