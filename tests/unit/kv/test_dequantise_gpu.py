"""Few bits made into KV by Triton are what torch makes of them, bit for bit, seen with its interpreter."""

# L layers, T tokens, H kv heads, D head dim

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.chunks import CodecName
from kv_agent.kv import dequantise_gpu, tried_kernels
from kv_agent.kv.quantize import Layout
from kv_agent.kv.rope import RotaryScheme, turns_of
from kv_agent.storage.codecs import Codec, Coded, coded_bytes
from tests.unit.kv.test_rotation_kernel import scheme_of
from tests.unit.kv.triton_compiler import Variant, require_they_compile
from tests.unit.storage.builders import same_bits

FEW: list[CodecName] = ["int8", "int4"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("nothing_tried")


def any_bytes(codec: CodecName, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Coded:
    num_bytes = coded_bytes(codec, shape, dtype)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return Coded(codec=codec, dtype=dtype, shape=shape, data=data)


def by_triton(coded: Coded, start: int, scheme: RotaryScheme) -> Tensor:
    L, _, T, H, D = coded.shape
    bits = int(coded.codec[3])
    layouts = Layout((L, H, D, T), bits), Layout((L, T, H * D), bits)
    with np.errstate(all="ignore"):  # the interpreter is numpy's
        return dequantise_gpu.dequantised(coded.data, layouts, coded.dtype, turns_of(start, T, scheme), CPU)


@pytest.mark.usefixtures("interpreted")
@settings(max_examples=80, deadline=None)
@given(
    codec=st.sampled_from(FEW),
    dtype=st.sampled_from(DTYPES),
    L=st.integers(1, 2),
    T=st.integers(1, 140),
    H=st.integers(1, 3),
    planes=st.sampled_from([1, 3, 8, 24, 32]),
    rest=st.sampled_from([0, 1, 7]),
    start=st.integers(-5, 100_000),
    seed=st.integers(0, 1000),
)
def test_any_bytes_are_decoded_as_torch_decodes_them(
    codec: CodecName,
    dtype: torch.dtype,
    L: int,
    T: int,
    H: int,
    planes: int,
    rest: int,
    start: int,
    seed: int,
) -> None:
    scheme = scheme_of(2 * planes)
    coded = any_bytes(codec, (L, 2, T, H, 2 * planes + rest), dtype, seed)

    found = by_triton(coded, start, scheme)

    assert same_bits(found, Codec(scheme=scheme).decode(coded, start))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("codec", FEW)
@pytest.mark.parametrize("shape", [(1, 2, 8193, 1, 4), (1, 2, 2, 1, 8193)], ids=["keys", "values"])
def test_rows_so_long_that_their_last_group_is_all_padding(codec: CodecName, shape: tuple[int, ...]) -> None:
    scheme = scheme_of(2)
    coded = any_bytes(codec, shape, torch.bfloat16, seed=1)

    assert same_bits(by_triton(coded, 5, scheme), Codec(scheme=scheme).decode(coded, 5))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ["int8", "int8+zstd", "int4", "int4+zstd"])
def test_a_codec_decodes_on_its_device_once_it_has_seen_that_this_works(
    codec: CodecName, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, kv_L2THD = scheme_of(32), torch.randn(2, 2, 90, 2, 40).to(dtype)
    chosen, plain = Codec(name=codec, scheme=scheme, device=CPU), Codec(name=codec, scheme=scheme)
    payload = plain.encode(kv_L2THD, 70)
    made: list[int] = []
    dequantised = dequantise_gpu.dequantised

    def counted(data: Tensor, *arguments: object) -> Tensor:
        made.append(data.numel())
        return dequantised(data, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dequantise_gpu, "dequantised", counted)
    assert same_bits(chosen.decode(payload, 3), plain.decode(payload, 3))
    assert not made

    chosen.prepare(dtype, num_heads=2, head_dim=40)

    assert len(made) == 1
    assert same_bits(chosen.decode(payload, 3), plain.decode(payload, 3))
    assert len(made) == 2


def test_a_kernel_that_differs_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nearly(data: Tensor, layouts: tuple[Layout, Layout], dtype: torch.dtype, *_: object) -> Tensor:
        L, H, D, T = layouts[0].shape
        return torch.zeros((L, 2, T, H, D), dtype=dtype)

    monkeypatch.setattr(dequantise_gpu, "dequantised", nearly)
    chosen = Codec(name="int4", scheme=scheme_of(8), device=CPU)

    chosen.prepare(torch.bfloat16, num_heads=2, head_dim=8)

    assert not tried_kernels.works(dequantise_gpu.kernel(4), torch.bfloat16, CPU)
    assert [record.event for record in caplog.records] == ["kernel_unavailable"]
    payload = chosen.encode(torch.randn(2, 2, 9, 2, 8).bfloat16(), 0)
    assert chosen.decode(payload, 0).any()


def test_a_device_that_is_full_leaves_it_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dequantise_gpu, "dequantised", full)
    monkeypatch.setattr(tried_kernels, "works", lambda *_: True)
    scheme, kv_L2THD = scheme_of(8), torch.randn(2, 2, 9, 2, 8).bfloat16()
    chosen, plain = Codec(name="int8", scheme=scheme, device=CPU), Codec(name="int8", scheme=scheme)
    payload = plain.encode(kv_L2THD, 0)

    assert same_bits(chosen.decode(payload, 4), plain.decode(payload, 4))


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_of_different_chunks_are_refused(bits: int) -> None:
    keys, values, turns = Layout((2, 3, 8, 5), bits), Layout((2, 5, 24), bits), turns_of(0, 5, scheme_of(8))
    data = torch.zeros(keys.num_bytes + values.num_bytes, dtype=torch.uint8)
    for wrong in (
        (data[:-1], (keys, values), turns),
        (data, (keys, Layout((2, 5, 23), bits)), turns),
        (data, (keys, Layout((2, 5, 24), 12 - bits)), turns),
        (data, (keys, values), turns_of(0, 4, scheme_of(8))),
        (data, (keys, values), (turns[0], turns[1][:, :3])),
        (data, (keys, values), turns_of(0, 5, scheme_of(10))),
        (data[:0], (Layout((2, 3, 8, 0), bits), Layout((2, 0, 24), bits)), turns_of(0, 0, scheme_of(8))),
    ):
        with pytest.raises(ValueError, match="differ"):
            dequantise_gpu.dequantised(wrong[0], wrong[1], torch.bfloat16, wrong[2], CPU)


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [False, True])
def test_it_compiles_for_gpus_without_one(is_packed: bool) -> None:
    variants, quantised, sizes = [], ["*u8", "*u8", "*i8", "*fp32"], ["i32", "i32", "i32"]
    for kind, is_bfloat16 in (("*i16", True), ("*fp16", False), ("*fp32", False)):
        numbers = {"IS_PACKED": is_packed, "IS_BFLOAT16": is_bfloat16}
        for rest in (0, 8):
            kinds = [*quantised, "*fp32", "*fp32", kind, *sizes]
            dims = {"D": 64 + rest, "F": 32, "PLANES": 32, "REST": rest, "TOKENS": 32}
            variants.append(Variant("dequantise_triton", "write_keys", kinds, dims | numbers))
        dims = {"V": 128, "TOKENS": 32, "WIDTH": 64}
        kinds = [*quantised, kind, *sizes]
        variants.append(Variant("dequantise_triton", "write_values", kinds, dims | numbers))
    require_they_compile(variants)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", FEW)
def test_on_a_gpu_chunks_are_decoded_as_in_host_memory(codec: CodecName, dtype: torch.dtype) -> None:
    scheme, device = scheme_of(64), torch.empty(0, device="cuda").device
    chosen, plain = Codec(name=codec, scheme=scheme, device=device), Codec(name=codec, scheme=scheme)
    chosen.prepare(dtype, num_heads=2, head_dim=72)
    assert tried_kernels.works(dequantise_gpu.kernel(int(codec[3])), dtype, device)

    for num_tokens in (1, 7, 128, 300):
        payload = plain.encode(torch.randn(3, 2, num_tokens, 2, 72).to(dtype), 1000)
        found = chosen.decode(payload, 1234)
        assert found.device == device
        assert same_bits(found.cpu(), plain.decode(payload, 1234))
