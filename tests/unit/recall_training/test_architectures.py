"""The models are what their description says, also after a save and load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from examples.models.recall_training import attention
from examples.models.recall_training.architectures import MAX_POSITIONS, build_model
from examples.models.recall_training.batches import Batch
from examples.models.recall_training.evaluation import token_logits
from tests.unit.recall_training.plain import Dialogue, sequels


def test_embeddings_are_tied_and_attention_is_that_of_shared_facts(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    embeddings = random_model.get_input_embeddings().weight
    assert random_model.lm_head.weight is embeddings
    assert embeddings.shape == (len(tokenizer), 128)
    assert random_model.config._attn_implementation == attention.NAME
    assert random_model.config.max_position_embeddings == MAX_POSITIONS


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize(("family", "heads", "kv_heads"), [("llama", 4, 2), ("qwen3", 6, 2)])
def test_attention_has_the_named_heads_of_64_at_any_width(
    tokenizer: PreTrainedTokenizerFast, family: str, heads: int, kv_heads: int, width: int
) -> None:
    model = build_model(family, tokenizer, layers=1, width=width, mlp=64)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.weight.shape == (heads * 64, width)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (kv_heads * 64, width)
    assert layer.head_dim == 64


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_matrices_begin_with_outputs_as_large_as_their_inputs(
    tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    torch.manual_seed(0)
    model = build_model(family, tokenizer, layers=1, width=256, mlp=64)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert len(matrices) == 8
    for matrix in matrices:
        assert float(matrix.detach().std()) == pytest.approx(1 / 16, rel=0.05)


def test_unknown_family_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="unknown family 'gpt'"):
        build_model("gpt", tokenizer, layers=1, width=128, mlp=64)


def test_saved_and_loaded_model_is_a_stock_one_with_the_same_logits_and_end(
    random_model: PreTrainedModel,
    batch: Batch,
    dialogues: list[Dialogue],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    random_model.save_pretrained(tmp_path)
    # No engine but the trainer has the attention that it was trained with.
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    first = next(sequels(tokenizer, dialogues[0]))
    with torch.inference_mode():
        plain_TV = loaded(input_ids=torch.tensor([first.ids])).logits[0, first.answer - 1 : -1]
        is_first_W = batch.answer_ids_W == 0
        batch_TV = token_logits(random_model, batch, batch.predicted_W[is_first_W])
    torch.testing.assert_close(plain_TV, batch_TV, atol=2e-4, rtol=1e-4)
    for name, tensor in random_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.pad_token_id) == (3, 0)
    assert not generation.do_sample
