"""Cosines of damped tokens against vectors moved one by one in float64."""

from __future__ import annotations

import numpy as np
import pytest

from kv_agent.retrieval import spaces as spaces_module
from kv_agent.retrieval.fitting import fitted_arrays, fitted_from
from kv_agent.retrieval.maxsim_kernel import best_cosines
from kv_agent.retrieval.sketches import Sketch, rounded
from kv_agent.retrieval.spaces import Spaces, centred_on, whitening_of
from kv_agent.retrieval.token_space import Query, Tokens, TokenSpace, together

SIZE = 24


def keys(num_tokens: int, seed: int = 0) -> np.ndarray:
    """A shared part, and directions of very different variance."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(np.random.default_rng(9).normal(size=(SIZE, SIZE)))[0]
    spread = np.geomspace(20, 0.2, SIZE)
    return (10 + (rng.normal(size=(num_tokens, SIZE)) * spread) @ turned).astype(np.float32)


def cosines_by_definition(
    fitted: np.ndarray, num_damped: int, query: np.ndarray, stored: np.ndarray
) -> np.ndarray:
    """The leading variances as they are, the others as their mean; all shrunk; inverted."""
    fitted, query, stored = (array.astype(np.float64) for array in (fitted, query, stored))
    variances, directions = np.linalg.eigh(np.cov(fitted, rowvar=False, bias=True))
    shrinkage = 0.01 * variances.mean()
    order = np.argsort(-variances)
    variances, directions = variances[order], directions[:, order]
    variances[num_damped:] = variances[num_damped:].mean() if num_damped < len(variances) else 0
    moving = directions * (variances + shrinkage) ** -0.5
    moved_query, moved_stored = ((array - fitted.mean(axis=0)) @ moving for array in (query, stored))
    lengths = np.outer(np.linalg.norm(moved_stored, axis=1), np.linalg.norm(moved_query, axis=1))
    cosines: np.ndarray = moved_stored @ moved_query.T / lengths
    return cosines


def cosines(tokens: Tokens, query: Query) -> np.ndarray:
    """Of every token by itself."""
    each = (Tokens(*(column[n : n + 1] for column in tokens)) for n in range(len(tokens.scales_T)))
    return best_cosines(query, list(each))


@pytest.mark.parametrize("num_damped", [1, 5, 23, 24, 64])
def test_cosines_are_those_of_vectors_moved_one_by_one(
    num_damped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spaces_module, "_DAMPED", num_damped)
    monkeypatch.setattr("kv_agent.retrieval.sketches._BLOCK_BYTES", 7 * 4 * SIZE)  # blocks of seven tokens
    fitted, query = keys(500), keys(5, seed=1)
    parts = [rounded(keys(num, seed=num)) for num in (1, 6, 13)]
    space = whitening_of(fitted).tokens
    found = np.concatenate([cosines(tokens, space.query(query)) for tokens in space.place(parts)])
    assert found == pytest.approx(
        cosines_by_definition(fitted, min(num_damped, SIZE), query, together(parts).keys()), abs=1e-4
    )


def test_whitened_by_all_directions_it_is_the_space_of_means() -> None:
    spaces = whitening_of(keys(500))
    sketch, query = rounded(keys(9, seed=2)), keys(4, seed=3)
    (tokens,) = spaces.tokens.place([sketch])
    expected = spaces.pooled.unit(sketch.keys()) @ spaces.pooled.unit(query).T
    assert cosines(tokens, spaces.tokens.query(query)) == pytest.approx(expected, abs=1e-4)


def test_without_directions_only_the_mean_goes() -> None:
    stored, query = rounded(keys(9)), keys(4, seed=3)
    for space, mean in ((TokenSpace(), 0), (centred_on(stored.keys()).tokens, stored.keys().mean(axis=0))):
        (tokens,) = space.place([stored])
        left, asked = stored.keys() - mean, query - mean
        expected = left @ asked.T / np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(asked, axis=1))
        assert cosines(tokens, space.query(query)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_few_tokens_are_no_trouble(num_tokens: int) -> None:
    space = whitening_of(keys(num_tokens)).tokens
    (tokens,) = space.place([rounded(keys(30, seed=4))])
    found = cosines(tokens, space.query(keys(3, seed=5)))
    assert np.abs(found).max() <= 1 + 1e-4


def test_a_token_that_is_the_mean_is_like_none() -> None:
    alike = np.full((3, SIZE), 5.0, dtype=np.float32)
    space = whitening_of(alike).tokens
    (tokens,) = space.place([rounded(alike)])
    assert not cosines(tokens, space.query(keys(2))).any()
    (others,) = space.place([rounded(keys(4))])
    assert not cosines(others, space.query(alike)).any()
    (zeros,) = TokenSpace().place([Sketch(np.zeros((2, SIZE), np.int8), np.zeros(2, np.float32))])
    assert not cosines(zeros, TokenSpace().query(keys(2))).any()


def test_no_cosine_is_above_one_where_one_direction_has_nearly_everything() -> None:
    """What is left of such tokens is the difference of two large numbers."""
    rng = np.random.default_rng(7)
    scales = np.array([1e4] + [1.0] * (SIZE - 1))
    tokens_TV = (rng.normal(size=(400, SIZE)) * scales).astype(np.float32)
    tokens_TV[:10, 1:] = 0
    space = whitening_of(tokens_TV).tokens
    (tokens,) = space.place([rounded(tokens_TV)])
    assert np.abs(cosines(tokens, space.query(tokens_TV[5:15]))).max() < 1.01


def test_what_was_fitted_comes_back_from_a_snapshot_s_arrays() -> None:
    spaces = whitening_of(keys(500))
    sketches, query = [rounded(keys(num, seed=num)) for num in (3, 8)], keys(4, seed=3)
    background = spaces.tokens.place(sketches)
    loaded, documents = fitted_from(fitted_arrays(spaces, background))
    np.testing.assert_array_equal(loaded.pooled.unit(query), spaces.pooled.unit(query))
    assert [len(tokens.scales_T) for tokens in documents] == [3, 8]
    np.testing.assert_array_equal(
        best_cosines(loaded.tokens.query(query), documents),
        best_cosines(spaces.tokens.query(query), background),
    )
    assert fitted_from(fitted_arrays(Spaces(), []))[1] == []
