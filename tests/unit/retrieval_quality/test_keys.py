"""Un-rotated keys and queries are what the model rotates and attends with."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.retrieval.keys import encode

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7, 7], [2, 7, 1, 8, 2]]


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def test_rotated_keys_are_those_of_the_models_own_cache(model: PreTrainedModel) -> None:
    for ids, encoded in zip(TEXTS, encode(model, TEXTS), strict=True):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cos, sin = model.model.rotary_emb(encoded.keys, torch.arange(len(ids))[None])
        for index, layer in enumerate(cache.layers):
            keys_1KTD = encoded.keys[index].transpose(0, 1)[None]
            rotated, _ = apply_rotary_pos_emb(keys_1KTD, keys_1KTD, cos, sin)
            torch.testing.assert_close(rotated, layer.keys)


def test_queries_have_their_own_heads_and_follow_the_last_text_only(model: PreTrainedModel) -> None:
    first = encode(model, TEXTS)
    again = encode(model, TEXTS[::-1])[::-1]
    for ids, one, other in zip(TEXTS, first, again, strict=True):
        assert one.token_ids == ids
        assert one.queries.shape == (3, len(ids), 4, 16)
        torch.testing.assert_close(one.queries, other.queries)


def test_hooks_are_gone_afterwards(model: PreTrainedModel) -> None:
    encode(model, TEXTS)
    assert not any(module._forward_hooks for module in model.modules())
