"""The one pass over keys in Triton gives what torch gives, bit for bit, seen with Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.kv import rotation_gpu
from kv_agent.kv.rope import RotaryScheme, copy_rotated_into, prepare_rotation, rotate_keys
from tests.unit.kv.triton_compiler import Variant, require_they_compile

pytestmark = pytest.mark.usefixtures("nothing_tried")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TURN = (torch.arange(1.0, 5.0).cos(), torch.arange(1.0, 5.0).sin())  # of four planes
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def by_torch(k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> Tensor:
    F = len(cos_F)
    a, b, rest = k_THD[..., :F].float(), k_THD[..., F : 2 * F].float(), k_THD[..., 2 * F :]
    turned = torch.cat((a * cos_F - b * sin_F, b * cos_F + a * sin_F), dim=-1)
    return torch.cat((turned.to(k_THD.dtype), rest), dim=-1)


def require_same(found: Tensor, expected: Tensor) -> None:
    bits = BITS[found.dtype]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(bits)[~found.isnan()], expected.view(bits)[~found.isnan()])


@pytest.mark.usefixtures("interpreted")
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)),
    num_planes=st.sampled_from([1, 3, 8, 24, 32]),
    rest=st.sampled_from([0, 1, 7]),
    skip=st.integers(0, 3),
    is_random=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_keys_are_rotated_as_torch_rotates_them(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    num_planes: int,
    rest: int,
    skip: int,
    is_random: bool,
    seed: int,
) -> None:
    L, T, H = shape
    generator = torch.Generator().manual_seed(seed)
    full = (L, 2, skip + T, H, 2 * num_planes + rest)
    kv_L2THD = torch.randn(full, generator=generator).to(dtype)
    if is_random and dtype != torch.float32:  # every kind of number: denormal, huge, infinite, NaN
        kv_L2THD = torch.randint(-(1 << 15), 1 << 15, full, generator=generator, dtype=torch.int16).view(
            dtype
        )
    out_L2THD = torch.full((L, 2, T + 3, H, full[-1]), 5.0, dtype=dtype)
    k_LTHD, out_LTHD = kv_L2THD[:, 0, skip:], out_L2THD[:, 0, 1 : 1 + T]
    angles_F = torch.randn(num_planes, generator=generator)

    with np.errstate(all="ignore"):  # the interpreter is numpy's
        rotation_gpu.rotate_into(out_LTHD, k_LTHD, angles_F.cos(), angles_F.sin())

    require_same(out_LTHD, by_torch(k_LTHD, angles_F.cos(), angles_F.sin()))
    assert (out_L2THD[:, 1] == 5).all()
    assert (out_L2THD[:, 0, [0, *range(1 + T, T + 3)]] == 5).all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_used_where_it_gives_what_torch_gives(dtype: torch.dtype) -> None:
    k_LTHD = torch.randn(2, 3, 2, 8).to(dtype)
    assert not rotation_gpu.fits(torch.empty_like(k_LTHD), k_LTHD)

    rotation_gpu.prepare(k_LTHD, *TURN, by_torch(k_LTHD, *TURN))

    assert rotation_gpu.fits(torch.empty_like(k_LTHD), k_LTHD)
    assert not rotation_gpu.fits(torch.empty_like(k_LTHD), k_LTHD.transpose(1, 2))
    assert not rotation_gpu.fits(torch.empty_like(k_LTHD[0]), k_LTHD[0])


def test_it_is_left_alone_where_it_differs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nearly(out_THD: Tensor, k_THD: Tensor, cos_F: Tensor, sin_F: Tensor) -> None:
        out_THD.copy_(by_torch(k_THD, cos_F, sin_F))
        out_THD.view(-1)[-1] += 0.5

    monkeypatch.setattr(rotation_gpu, "rotate_into", nearly)
    k_LTHD = torch.randn(2, 3, 2, 8)
    rotation_gpu.prepare(k_LTHD, *TURN, by_torch(k_LTHD, *TURN))

    assert not rotation_gpu.fits(torch.empty_like(k_LTHD), k_LTHD)
    assert [record.event for record in caplog.records] == ["kernel_unavailable"]


@pytest.mark.slow
def test_it_compiles_for_gpus_without_one() -> None:
    variants = []
    for kind, is_bfloat16 in (("*i16", True), ("*fp16", False), ("*fp32", False)):
        for rest in (0, 8):
            kinds = [kind, kind, "*fp32", "*fp32", "i64", "i64", "i32"]
            dims = {"D": 64 + rest, "F": 32, "PLANES": 32, "REST": rest, "ROWS": 16}
            constants = dims | {"IS_BFLOAT16": is_bfloat16}
            variants.append(Variant("rotation_triton", "turn_rows", kinds, constants))
    require_they_compile(variants)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_keys_are_rotated_as_in_host_memory(dtype: torch.dtype) -> None:
    scheme = RotaryScheme(inv_freq=tuple(1e6 ** (-i / 32) for i in range(32)), rotary_dim=64, neox=True)
    k_LTHD = torch.randn(2, 300, 2, 72).to(dtype)
    out_LTHD = torch.empty_like(k_LTHD, device="cuda")
    prepare_rotation(scheme, dtype, out_LTHD.device)
    assert rotation_gpu.fits(out_LTHD, k_LTHD.cuda())

    copy_rotated_into(out_LTHD, k_LTHD.cuda(), 1234, scheme)

    require_same(out_LTHD.cpu(), rotate_keys(k_LTHD, 1234, scheme))
