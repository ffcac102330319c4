"""Pooled keys against a loop over tokens, and their bytes."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch

from kv_agent.kv.rope import RotaryScheme, rotate_keys
from kv_agent.retrieval.pooling import from_bytes, pool_keys, to_bytes

SCHEME = RotaryScheme(inv_freq=(1.0, 0.1, 0.01, 0.001), rotary_dim=8, neox=True)


def keys(num_tokens: int) -> torch.Tensor:
    return torch.randn(4, num_tokens, 2, 10, generator=torch.Generator().manual_seed(num_tokens))


@pytest.mark.parametrize("layers", [[0], [3], [1, 3], [3, 0]])
def test_pooled_keys_are_the_mean_of_each_layer_s_keys_turned_back(layers: list[int]) -> None:
    k = keys(5)
    expected = []
    for layer in layers:
        for head in range(2):
            total = [0.0] * 10
            for token in range(5):
                values = k[layer, token, head].tolist()
                plain = list(values)
                for i, freq in enumerate(SCHEME.inv_freq):
                    angle = -(30 + token) * freq
                    plain[i] = values[i] * math.cos(angle) - values[i + 4] * math.sin(angle)
                    plain[i + 4] = values[i + 4] * math.cos(angle) + values[i] * math.sin(angle)
                total = [t + p / 5 for t, p in zip(total, plain, strict=True)]
            expected += total
    pooled = pool_keys(k, 30, SCHEME, layers)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.tensor(expected), rtol=0, atol=1e-5)


def test_pooled_keys_do_not_depend_on_the_position() -> None:
    k = keys(7)
    torch.testing.assert_close(
        pool_keys(rotate_keys(k, 5000, SCHEME), 5003, SCHEME, [0, 2]), pool_keys(k, 3, SCHEME, [0, 2])
    )


def test_bfloat16_keys_are_pooled_in_float32() -> None:
    k = keys(300).bfloat16()
    assert torch.equal(pool_keys(k, 0, SCHEME, [1]), pool_keys(k.float(), 0, SCHEME, [1]))


def test_keys_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4, 0, 2, 10\]"):
        pool_keys(keys(0), 0, SCHEME, [0])


def test_bytes_are_little_endian_float32_and_come_back() -> None:
    vector = np.array([1.5, -2.25, 3e-8], dtype=np.float32)
    assert to_bytes(vector) == struct.pack("<3f", *vector)
    assert to_bytes(torch.from_numpy(vector)) == to_bytes(vector)
    assert np.array_equal(from_bytes(to_bytes(vector)), vector)
    assert from_bytes(to_bytes(vector)).dtype == np.float32
