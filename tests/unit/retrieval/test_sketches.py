"""Keys rounded to a byte and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kv_agent.retrieval.sketches import from_sketch, to_sketch


def test_each_value_is_within_half_a_level_of_its_token_s_largest() -> None:
    rng = np.random.default_rng(0)
    keys = (rng.normal(size=(50, 7)) * rng.lognormal(sigma=4, size=(50, 1))).astype(np.float32)
    back = from_sketch(to_sketch(keys))
    assert back.dtype == np.float32
    level = np.abs(keys).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - keys) <= 0.501 * level).all()


def test_a_sketch_has_a_byte_a_value_and_four_a_token() -> None:
    assert len(to_sketch(np.ones((5, 64), dtype=np.float32))) == 8 + 5 * (4 + 64)


def test_tensors_of_any_float_type_and_zeros_come_back() -> None:
    keys = torch.tensor([[0.0, 0.0], [127.0, -1.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert from_sketch(to_sketch(keys.to(dtype))).tolist() == keys.tolist()
    assert from_sketch(to_sketch(np.empty((0, 3), dtype=np.float32))).shape == (0, 3)


@pytest.mark.parametrize("bad", [np.ones(3), np.array([[1, np.nan]]), np.array([[np.inf]])])
def test_what_is_no_keys_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not"):
        to_sketch(bad.astype(np.float32))


@pytest.mark.parametrize("cut", [0, 7, 8, -1])
def test_cut_bytes_are_refused(cut: int) -> None:
    data = to_sketch(np.ones((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="sketch"):
        from_sketch(data[:cut])
    with pytest.raises(ValueError, match="sketch"):
        from_sketch(data + b"1")
