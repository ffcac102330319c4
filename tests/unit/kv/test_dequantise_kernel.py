"""The one pass from few bits to bfloat16 KV gives what torch gives in many, bit for bit."""

# L layers, T tokens, H kv heads, D head dim, F rotary planes

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_agent.chunks import CodecName
from kv_agent.kv import dequantise_kernel
from kv_agent.kv.quantize import Layout, Quantised
from kv_agent.kv.rope import RotaryScheme, turns_of
from kv_agent.storage.codecs import Codec, Coded, coded_bytes
from tests.unit.kv.test_rotation_kernel import scheme_of

FEW: list[CodecName] = ["int8", "int4"]


class Dims(NamedTuple):
    """Of a chunk; ``rotary`` is how many of its head dims are turned."""

    L: int
    T: int
    H: int
    D: int
    rotary: int

    @property
    def scheme(self) -> RotaryScheme:
        return scheme_of(self.rotary)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.L, 2, self.T, self.H, self.D


def numbers(dims: Dims, codec: CodecName, start: int) -> Coded:
    kv = torch.randn(dims.shape, generator=torch.Generator().manual_seed(dims.T)).bfloat16()
    payload = Codec(name=codec, scheme=dims.scheme).encode(kv, start)
    assert isinstance(payload, Coded)
    return payload


def random_bytes(dims: Dims, codec: CodecName, seed: int) -> Coded:
    """Every code, scale and low, also such as are never written."""
    num_bytes = coded_bytes(codec, dims.shape, torch.bfloat16)
    data = torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Coded(codec=codec, dtype=torch.bfloat16, shape=dims.shape, data=data)


def by_torch(payload: Coded, start: int, scheme: RotaryScheme) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantise_kernel, "serves", lambda *_: False)
        patch.setattr(dequantise_kernel, "dequantised", None)
        return Codec(scheme=scheme).decode(payload, start)


def require_same(payload: Coded, start: int, scheme: RotaryScheme) -> None:
    assert dequantise_kernel.serves(payload.shape, payload.dtype, scheme.rotary_dim, payload.data)
    data = payload.data.clone()
    expected = by_torch(payload, start, scheme)

    found = Codec(scheme=scheme).decode(payload, start)

    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.bfloat16, payload.shape, True)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(payload.data, data)


@pytest.mark.parametrize("codec", FEW)
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 63, 64, 65, 95, 96, 97, 128, 500])
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "rotary_dim"),
    [(2, 64, 64), (3, 64, 16), (2, 80, 32), (1, 80, 80), (2, 24, 24), (3, 5, 2), (1, 128, 96)],
)
def test_chunks_are_decoded_as_torch_decodes_them(
    codec: CodecName, num_tokens: int, num_heads: int, head_dim: int, rotary_dim: int
) -> None:
    dims = Dims(3, num_tokens, num_heads, head_dim, rotary_dim)
    for start in (0, 1000, 100_000):
        require_same(numbers(dims, codec, start), start, dims.scheme)


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(FEW),
    L=st.integers(1, 3),
    T=st.integers(1, 210),
    H=st.integers(1, 4),
    planes=st.integers(1, 40),
    rest=st.integers(0, 40),
    start=st.integers(0, 1_000_000),
    seed=st.integers(0, 1000),
)
def test_any_bytes_are_decoded_as_torch_decodes_them(
    codec: CodecName, L: int, T: int, H: int, planes: int, rest: int, start: int, seed: int
) -> None:
    dims = Dims(L, T, H, 2 * planes + rest, 2 * planes)
    require_same(random_bytes(dims, codec, seed), start, dims.scheme)


@pytest.mark.parametrize("codec", FEW)
def test_every_byte_is_the_same_scale_and_the_same_low_as_for_torch(codec: CodecName) -> None:
    dims = Dims(1, 128, 2, 64, 64)
    payload = random_bytes(dims, codec, seed=0)
    bits = int(codec[3])
    of_keys = Layout((1, 2, 64, 128), bits).num_bytes
    for run in (payload.data[:of_keys], payload.data[of_keys:]):
        behind_codes = run[128 * 2 * 64 * bits // 8 :]
        assert behind_codes.numel() == 256 * (2 if bits == 4 else 1)
        behind_codes[:256] = torch.arange(256).to(torch.uint8)
        behind_codes[256:] = torch.arange(behind_codes.numel() - 256).flip(0).to(torch.uint8)

    require_same(payload, 77, dims.scheme)


@pytest.mark.parametrize("codec", FEW)
@pytest.mark.parametrize("dims", [Dims(1, 8193, 1, 4, 2), Dims(1, 2, 2731, 3, 2)], ids=["keys", "values"])
def test_rows_so_long_that_their_last_group_is_all_padding(codec: CodecName, dims: Dims) -> None:
    num_groups, size = Layout((8193,), 8).groups_GS
    assert (num_groups - 1) * size > 8193

    require_same(random_bytes(dims, codec, seed=1), 5, dims.scheme)


def test_threads_side_by_side_do_not_disturb_each_other() -> None:
    dims = Dims(6, 100, 2, 80, 64)
    work = [(random_bytes(dims, codec, seed), seed) for seed in range(12) for codec in FEW]
    expected = [by_torch(payload, start, dims.scheme) for payload, start in work]
    codec = Codec(scheme=dims.scheme)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda item: codec.decode(*item), work))
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("codec", FEW)
@pytest.mark.parametrize(
    ("dtype", "neox"), [(torch.float16, True), (torch.float32, True), (torch.bfloat16, False)]
)
def test_other_chunks_are_left_to_torch(
    codec: CodecName, dtype: torch.dtype, neox: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantise_kernel, "dequantised", None)
    scheme = RotaryScheme(inv_freq=(1.0, 0.3), rotary_dim=4, neox=neox)
    kv = torch.randn(2, 2, 9, 2, 8).to(dtype)
    chosen = Codec(name=codec, scheme=scheme)

    found = chosen.decode(chosen.encode(kv, 3), 3)

    assert found.dtype == dtype
    assert torch.allclose(found.float(), kv.float(), atol=0.6)


@pytest.mark.parametrize(
    ("shape", "dtype", "data"),
    [
        ((2, 2, 3, 2, 7), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((2, 1, 3, 2, 8), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((2, 3, 3, 2, 8), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((-2, 2, 3, -2, 8), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((2, 2, 0, 2, 8), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((2, 3, 2, 8), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((), torch.bfloat16, torch.empty(9, dtype=torch.uint8)),
        ((2, 2, 3, 2, 8), torch.float16, torch.empty(9, dtype=torch.uint8)),
        ((2, 2, 3, 2, 8), torch.bfloat16, torch.empty(9, dtype=torch.int8)),
        ((2, 2, 3, 2, 8), torch.bfloat16, torch.empty(18, dtype=torch.uint8)[::2]),
        ((2, 2, 3, 2, 8), torch.bfloat16, torch.empty(9, dtype=torch.uint8, device="meta")),
    ],
)
def test_what_machine_code_would_not_stay_within_is_not_served(
    shape: tuple[int, ...], dtype: torch.dtype, data: Tensor
) -> None:
    assert not dequantise_kernel.serves(shape, dtype, 8, data)
    assert dequantise_kernel.serves((2, 2, 3, 2, 8), torch.bfloat16, 8, torch.empty(9, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_is_machine_code_for_bfloat16_alone(dtype: torch.dtype) -> None:
    served = dequantise_kernel.serves((2, 2, 3, 2, 8), dtype, 8, torch.empty(9, dtype=torch.uint8))
    assert dequantise_kernel.writes(dtype) == served == (dtype == torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_of_different_chunks_are_refused(bits: int) -> None:
    def part(*shape: int, bits: int = bits) -> Quantised:
        layout = Layout(shape, bits)
        return Quantised(layout, torch.zeros(layout.num_bytes, dtype=torch.uint8))

    keys, values, (cos, sin) = part(2, 3, 8, 5), part(2, 5, 24), turns_of(0, 5, scheme_of(8))
    assert dequantise_kernel.dequantised(keys, values, cos, sin).shape == (2, 2, 5, 3, 8)

    for wrong in (
        (keys, part(2, 5, 23), cos, sin),
        (keys, part(2, 6, 24), cos, sin),
        (keys, part(2, 5, 24, bits=12 - bits), cos, sin),
        (keys, values, cos[:4], sin[:4]),
        (keys, values, cos, sin[:, :3]),
        (keys, values, *turns_of(0, 5, scheme_of(10))),
        (part(2, 3, 8, 0), part(2, 0, 24), cos[:0], sin[:0]),
    ):
        with pytest.raises(ValueError, match="differ"):
            dequantise_kernel.dequantised(*wrong)
    with pytest.raises(ValueError, match="bytes are not the"):
        Quantised(keys.layout, keys.data[:-1])
