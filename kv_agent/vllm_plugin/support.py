"""What the plugin can serve correctly. Everything else is refused at start with one sentence."""

from __future__ import annotations

from typing import Any

from kv_agent.errors import ConfigError, UnsupportedModelError

# Decoder-only text models whose every layer is full attention with the same rotary embedding on all keys.
# A model is added here after its attention code was read and its KV was compared with recomputation.
SUPPORTED_ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)

# Rotary embeddings that turn queries and keys by the rows of the one table that `_compute_cos_sin_cache()`
# returns; whether that table is linear in the position is measured.
SUPPORTED_ROTARY_EMBEDDINGS = frozenset(
    {
        "RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "NTKScalingRotaryEmbedding",
        "DynamicNTKScalingRotaryEmbedding",
        "DynamicNTKAlphaRotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
        "Llama3RotaryEmbedding",
    }
)


def check_connector_config(kv_transfer_config: Any) -> dict[str, Any]:
    """The raw ``kv_agent`` object of the connector's configuration; raises on anything beside it."""
    extra = dict(kv_transfer_config.kv_connector_extra_config)
    raw = extra.pop("kv_agent", {})
    if extra:
        raise ConfigError(
            f"kv_connector_extra_config has unknown keys {sorted(extra)}; put kv_agent's settings under "
            'the key "kv_agent" and remove the others'
        )
    if not isinstance(raw, dict):
        raise ConfigError('kv_connector_extra_config["kv_agent"] must be an object')
    if kv_transfer_config.kv_role != "kv_both":
        raise ConfigError(f'kv_role must be "kv_both", got "{kv_transfer_config.kv_role}"')
    return raw


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise :class:`UnsupportedModelError` unless this engine's KV can be stored and moved correctly."""
    if (problem := _problem(vllm_config, kv_cache_config)) is not None:
        raise UnsupportedModelError(f"{problem}; start vLLM without kv_agent for this set-up")


def _problem(vllm_config: Any, kv_cache_config: Any) -> str | None:
    model = vllm_config.model_config
    architectures = list(model.hf_config.architectures or ())
    if model.runner_type != "generate":
        return f"kv_agent serves text generation, not runner type {model.runner_type!r}"
    if model.use_mla:
        return f"kv_agent does not support multi-head latent attention (MLA), which {architectures} uses"
    if model.is_hybrid or model.is_attention_free:
        return f"kv_agent does not support hybrid or state-space models such as {architectures}"
    if model.is_multimodal_model:
        return f"kv_agent does not support multimodal models such as {architectures}"
    if not SUPPORTED_ARCHITECTURES.intersection(architectures):
        return f"kv_agent supports {', '.join(sorted(SUPPORTED_ARCHITECTURES))}, not {architectures}"
    parallel = vllm_config.parallel_config
    if parallel.world_size != 1 or parallel.decode_context_parallel_size != 1:
        return "kv_agent supports one worker per engine (tensor and pipeline parallel size 1)"
    if vllm_config.speculative_config is not None:
        return "kv_agent does not support speculative decoding"
    if vllm_config.cache_config.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        return f"kv_agent does not support quantised KV caches ({vllm_config.cache_config.cache_dtype})"
    if len(kv_cache_config.kv_cache_groups) != 1:
        return "kv_agent supports one group of KV cache layers, this model has several"
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    if getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None):
        return "kv_agent does not support sliding-window or chunked attention"
    return None


def trained_window(model_config: Any) -> int:
    """Positions that the model was trained on, which vLLM can be told to exceed."""
    return int(getattr(model_config.hf_text_config, "max_position_embeddings", model_config.max_model_len))


def check_rope_modules(modules: list[Any]) -> Any:
    """The one rotary embedding that all layers share, of a kind that is known; raises otherwise."""
    if len(modules) != 1:
        raise UnsupportedModelError(f"the model has {len(modules)} rotary position embeddings instead of one")
    module = modules[0]
    if type(module).__name__ not in SUPPORTED_ROTARY_EMBEDDINGS:
        raise UnsupportedModelError(f"the rotary embedding {type(module).__name__} is not known")
    return module
