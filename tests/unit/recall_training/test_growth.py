"""A model that grew computes what it grew from, and can learn with its new layers."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.growth import grow_from


def model_of(family: str, tokenizer: PreTrainedTokenizerFast, layers: int) -> PreTrainedModel:
    model = build_model(family, tokenizer, layers=layers, width=128, mlp=64).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_it_computes_the_same_and_every_layer_learns(
    tokenizer: PreTrainedTokenizerFast, family: str, layers: int
) -> None:
    torch.manual_seed(0)
    shallow, deep = model_of(family, tokenizer, 2), model_of(family, tokenizer, layers)
    ids = torch.randint(5, 500, (2, 30))
    with torch.no_grad():
        wanted = shallow(ids, use_cache=False).logits
        assert not torch.allclose(deep(ids, use_cache=False).logits, wanted, atol=1e-3)
        grow_from(shallow, deep)
        torch.testing.assert_close(deep(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-5)
    deep(ids, labels=ids, use_cache=False).loss.backward()
    for layer in deep.model.layers:
        assert layer.self_attn.o_proj.weight.grad.abs().max() > 0
        assert layer.mlp.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("layers", [1, 5])
def test_fewer_layers_or_more_than_twice_as_many_are_an_error(
    tokenizer: PreTrainedTokenizerFast, layers: int
) -> None:
    with pytest.raises(ValueError, match=f"2 layers can grow to at most 4, not {layers}"):
        grow_from(model_of("llama", tokenizer, 2), model_of("llama", tokenizer, layers))
