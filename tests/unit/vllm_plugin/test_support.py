"""What is refused at start, each with a sentence that names the problem."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kv_agent.errors import ConfigError, UnsupportedModelError
from kv_agent.vllm_plugin.support import (
    SUPPORTED_ARCHITECTURES,
    check_connector_config,
    check_rope_modules,
    check_supported,
    trained_window,
)


def supported() -> tuple[Any, Any]:
    """A set-up that is served: engine configuration and KV cache configuration."""
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
            runner_type="generate",
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            is_multimodal_model=False,
            dtype="torch.bfloat16",
        ),
        parallel_config=SimpleNamespace(world_size=1, decode_context_parallel_size=1),
        speculative_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    spec = SimpleNamespace(sliding_window=None, attention_chunk_size=None, block_size=16)
    return engine, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])


@pytest.mark.parametrize("architecture", sorted(SUPPORTED_ARCHITECTURES))
@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16"])
def test_plain_decoders_are_served(architecture: str, cache_dtype: str) -> None:
    engine, kv_cache = supported()
    engine.model_config.hf_config.architectures = [architecture]
    engine.cache_config.cache_dtype = cache_dtype
    check_supported(engine, kv_cache)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("model_config.runner_type", "pooling", "text generation, not runner type 'pooling'"),
        ("model_config.use_mla", True, r"multi-head latent attention \(MLA\)"),
        ("model_config.is_hybrid", True, "hybrid or state-space models"),
        ("model_config.is_attention_free", True, "hybrid or state-space models"),
        ("model_config.is_multimodal_model", True, "multimodal models"),
        ("model_config.hf_config.architectures", ["Gemma3ForCausalLM"], "not .*Gemma3ForCausalLM"),
        ("model_config.hf_config.architectures", [], r"not \[\]"),
        ("model_config.hf_config.architectures", None, r"not \[\]"),
        ("parallel_config.world_size", 2, "one worker per engine"),
        ("parallel_config.decode_context_parallel_size", 2, "one worker per engine"),
        ("speculative_config", SimpleNamespace(), "speculative decoding"),
        ("cache_config.cache_dtype", "fp8", r"quantised KV caches \(fp8\)"),
        ("cache_config.cache_dtype", "float16", r"quantised KV caches \(float16\)"),
    ],
)
def test_other_engines_are_refused_by_name_of_the_problem(path: str, value: object, problem: str) -> None:
    engine, kv_cache = supported()
    *parents, name = path.split(".")
    target = engine
    for parent in parents:
        target = getattr(target, parent)
    setattr(target, name, value)
    with pytest.raises(UnsupportedModelError, match=rf"{problem}.*; start vLLM without kv_agent"):
        check_supported(engine, kv_cache)


@pytest.mark.parametrize("attribute", ["sliding_window", "attention_chunk_size"])
def test_attention_that_does_not_see_every_token_is_refused(attribute: str) -> None:
    engine, kv_cache = supported()
    setattr(kv_cache.kv_cache_groups[0].kv_cache_spec, attribute, 4096)
    with pytest.raises(UnsupportedModelError, match="sliding-window or chunked attention"):
        check_supported(engine, kv_cache)


def test_a_spec_without_windows_is_served() -> None:
    engine, kv_cache = supported()
    kv_cache.kv_cache_groups[0].kv_cache_spec = SimpleNamespace(block_size=16)
    check_supported(engine, kv_cache)


@pytest.mark.parametrize("num_groups", [0, 2])
def test_several_groups_of_layers_are_refused(num_groups: int) -> None:
    engine, kv_cache = supported()
    kv_cache.kv_cache_groups *= num_groups
    with pytest.raises(UnsupportedModelError, match="one group of KV cache layers"):
        check_supported(engine, kv_cache)


# -- the connector's own configuration ----------------------------------------------------------------


def connector_config(extra: dict[str, Any], role: str = "kv_both") -> Any:
    return SimpleNamespace(kv_connector_extra_config=extra, kv_role=role)


def test_the_raw_settings_are_what_stands_under_kv_agent() -> None:
    extra = {"kv_agent": {"store": "/data", "chunk_tokens": 7}}
    assert check_connector_config(connector_config(extra)) == {"store": "/data", "chunk_tokens": 7}
    assert extra == {"kv_agent": {"store": "/data", "chunk_tokens": 7}}
    assert check_connector_config(connector_config({})) == {}


@pytest.mark.parametrize(
    ("extra", "role", "problem"),
    [
        ({"kv_agent": {}, "store": "/data", "chunks": 1}, "kv_both", r"unknown keys \['chunks', 'store'\]"),
        ({"kv_agent": "/data"}, "kv_both", "must be an object"),
        ({"kv_agent": None}, "kv_both", "must be an object"),
        ({"kv_agent": {}}, "kv_producer", 'kv_role must be "kv_both", got "kv_producer"'),
        ({}, "kv_consumer", 'kv_role must be "kv_both"'),
    ],
)
def test_other_connector_settings_are_errors(extra: dict[str, Any], role: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_connector_config(connector_config(extra, role))


# -- rotary embeddings ----------------------------------------------------------------------------------


def rotary(name: str) -> Any:
    return type(name, (), {"_compute_cos_sin_cache": lambda self: None, "is_neox_style": True})()


@pytest.mark.parametrize("name", ["RotaryEmbedding", "Llama3RotaryEmbedding", "YaRNScalingRotaryEmbedding"])
def test_one_known_rotary_embedding_can_be_moved(name: str) -> None:
    module = rotary(name)
    assert check_rope_modules([module]) is module


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], "the model has 0 rotary position embeddings instead of one"),
        (["RotaryEmbedding", "RotaryEmbedding"], "the model has 2"),
        (["MRotaryEmbedding"], "the rotary embedding MRotaryEmbedding is not known"),
        (["Phi3LongRoPEScaledRotaryEmbedding"], "the rotary embedding Phi3LongRoPEScaled"),
    ],
)
def test_no_several_or_unknown_rotary_embeddings_cannot_be_moved(names: list[str], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        check_rope_modules([rotary(name) for name in names])


def test_the_window_is_what_the_model_was_trained_on_not_what_vllm_was_told() -> None:
    trained = SimpleNamespace(hf_text_config=SimpleNamespace(max_position_embeddings=512), max_model_len=2048)
    silent = SimpleNamespace(hf_text_config=SimpleNamespace(), max_model_len=2048)
    assert trained_window(trained) == 512
    assert trained_window(silent) == 2048
