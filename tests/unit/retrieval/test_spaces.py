"""Centring and whitening against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from kv_agent.retrieval.spaces import Space, centred_on, whitening_of


def correlated(num_tokens: int, size: int = 6) -> np.ndarray:
    """A shared part, and a direction that varies a hundred times as much as the others."""
    rng = np.random.default_rng(num_tokens)
    scales = np.array([100.0] + [1.0] * (size - 1))
    turned = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (50 + (rng.normal(size=(num_tokens, size)) * scales) @ turned).astype(np.float32)


def test_whitened_tokens_have_mean_zero_and_equal_variances() -> None:
    tokens = correlated(20_000)
    space = whitening_of(tokens).pooled
    assert space.mean_V is not None
    assert space.matrix_VV is not None
    white = (tokens.astype(np.float64) - space.mean_V) @ space.matrix_VV
    assert np.abs(white.mean(axis=0)).max() < 1e-3
    variances = np.linalg.eigvalsh(np.cov(tokens, rowvar=False))
    expected = variances / (variances + 0.01 * variances.mean())
    assert np.linalg.eigvalsh(np.cov(white, rowvar=False)) == pytest.approx(np.sort(expected), rel=0.01)


def test_without_whitening_only_the_mean_goes() -> None:
    tokens = correlated(30)
    centred = tokens - tokens.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.allclose(centred_on(tokens).pooled.unit(tokens), expected, atol=1e-5)


def test_vectors_have_length_one_unless_nothing_is_left_of_them() -> None:
    tokens = correlated(40)
    for space in (Space(), centred_on(tokens).pooled, whitening_of(tokens).pooled):
        assert np.linalg.norm(space.unit(tokens), axis=1) == pytest.approx(np.ones(40), abs=1e-5)
    alike = np.full((3, 2), 5.0, dtype=np.float32)
    assert not centred_on(alike).pooled.unit(alike).any()
    assert not whitening_of(alike).pooled.unit(alike).any()


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_fewer_tokens_than_dimensions_are_no_trouble(num_tokens: int) -> None:
    tokens = correlated(num_tokens)
    unit = whitening_of(tokens).pooled.unit(correlated(10))
    assert np.isfinite(unit).all()


@pytest.mark.parametrize("num_tokens", [3, 5, 6, 7, 40])
def test_the_whitening_is_that_of_the_covariance_however_few_tokens(num_tokens: int) -> None:
    """The inverse of covariance plus shrinkage; what is compared does not depend on a rotation."""
    tokens = correlated(num_tokens).astype(np.float64)
    covariance = np.cov(tokens, rowvar=False, bias=True)
    shrunk = covariance + 0.01 * np.trace(covariance) / 6 * np.eye(6)
    space = whitening_of(tokens.astype(np.float32)).pooled
    assert space.matrix_VV is not None
    product = space.matrix_VV.astype(np.float64) @ space.matrix_VV.T.astype(np.float64)
    assert product == pytest.approx(np.linalg.inv(shrunk), rel=1e-3, abs=1e-6)
