"""Pooled keys against a loop over tokens, and their bytes."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch

from kv_agent.kv.rope import RotaryScheme, rotate_keys
from kv_agent.retrieval.pooling import as_rows, from_bytes, pool_keys, to_bytes, token_keys

SCHEME = RotaryScheme(inv_freq=(1.0, 0.1, 0.01, 0.001), rotary_dim=8, neox=True)


def keys(num_tokens: int) -> torch.Tensor:
    return torch.randn(4, num_tokens, 2, 10, generator=torch.Generator().manual_seed(num_tokens))


@pytest.mark.parametrize("layers", [[0], [3], [1, 3], [3, 0]])
def test_token_keys_are_those_of_each_layer_and_head_turned_back(layers: list[int]) -> None:
    k = keys(5)
    expected = []
    for token in range(5):
        row: list[float] = []
        for layer in layers:
            for head in range(2):
                values = k[layer, token, head].tolist()
                plain = list(values)
                for i, freq in enumerate(SCHEME.inv_freq):
                    angle = -(30 + token) * freq
                    plain[i] = values[i] * math.cos(angle) - values[i + 4] * math.sin(angle)
                    plain[i + 4] = values[i + 4] * math.cos(angle) + values[i] * math.sin(angle)
                row += plain
        expected.append(row)
    found = token_keys(k, 30, SCHEME, layers)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(pool_keys(found), torch.tensor(expected).mean(0), rtol=0, atol=1e-5)


def test_token_keys_do_not_depend_on_the_position() -> None:
    k = keys(7)
    moved = rotate_keys(k, 5000, SCHEME)
    torch.testing.assert_close(token_keys(moved, 5003, SCHEME, [0, 2]), token_keys(k, 3, SCHEME, [0, 2]))


def test_bfloat16_keys_are_turned_in_float32() -> None:
    k = keys(300).bfloat16()
    assert torch.equal(token_keys(k, 0, SCHEME, [1]), token_keys(k.float(), 0, SCHEME, [1]))


def test_keys_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4, 0, 2, 10\]"):
        token_keys(keys(0), 0, SCHEME, [0])


def test_bytes_are_little_endian_float32_and_come_back() -> None:
    vector = np.array([1.5, -2.25, 3e-8], dtype=np.float32)
    assert to_bytes(vector) == struct.pack("<3f", *vector)
    assert to_bytes(torch.from_numpy(vector)) == to_bytes(vector)
    assert np.array_equal(from_bytes(to_bytes(vector)), vector)
    assert from_bytes(to_bytes(vector)).dtype == np.float32


def test_one_vector_is_one_row() -> None:
    vector = np.array([1.5, -2.25], dtype=np.float32)
    assert as_rows(vector).tolist() == as_rows(torch.from_numpy(vector)[None]).tolist() == [[1.5, -2.25]]
    assert as_rows(torch.zeros(3, 2, dtype=torch.bfloat16)).shape == (3, 2)
