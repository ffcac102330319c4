"""The models are what their description says, also after a save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from examples.models.recall_training.architectures import MAX_POSITIONS, build_model
from tests.unit.recall_training.plain import plain_ids


def test_embeddings_are_tied_and_attention_is_sdpa(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    embeddings = random_model.get_input_embeddings().weight
    assert random_model.lm_head.weight is embeddings
    assert embeddings.shape == (len(tokenizer), 128)
    assert random_model.config._attn_implementation == "sdpa"
    assert random_model.config.max_position_embeddings == MAX_POSITIONS


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "head_size"), [("llama", 4, 2, 64), ("qwen3", 8, 2, 32)]
)
def test_attention_of_the_default_width_has_the_named_heads(
    tokenizer: PreTrainedTokenizerFast, family: str, heads: int, kv_heads: int, head_size: int
) -> None:
    model = build_model(family, tokenizer, layers=1, width=256, mlp=64)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (heads * head_size, 256)
    assert attention.k_proj.weight.shape == (kv_heads * head_size, 256)
    assert attention.head_dim == head_size


def test_unknown_family_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="unknown family 'gpt'"):
        build_model("gpt", tokenizer, layers=1, width=128, mlp=64)


def test_saved_and_loaded_model_gives_the_same_logits_and_stops_at_the_same_token(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    random_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_BT = torch.tensor([plain_ids(tokenizer, "<|user|>Ada Bauer lives in Oslo.<|end|><|assistant|>")])
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids_BT).logits, random_model(input_ids=ids_BT).logits)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.pad_token_id) == (3, 0)
    assert not generation.do_sample
