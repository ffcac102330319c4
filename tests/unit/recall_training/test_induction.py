"""A planted induction head copies from the first step; recitations are what it is kept alive with."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.batches import Encoder, collate
from examples.models.recall_training.evaluation import token_logits
from examples.models.recall_training.induction import plant_induction_head

LENGTH = 200
REPEATED = 40


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build_model(request.param, tokenizer, layers=3, width=256, mlp=64)
    plant_induction_head(model, torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture
def ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Random tokens, the middle of which comes again at the end."""
    first = random.Random(0).sample(range(5, len(tokenizer)), LENGTH)
    start = LENGTH // 3
    return torch.tensor([first + first[start : start + REPEATED]])


def attentions(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        found: tuple[Tensor, ...] = model(ids, output_attentions=True).attentions
    return found


def test_the_first_head_sees_the_predecessor(model: PreTrainedModel, ids: Tensor) -> None:
    weights_TT = attentions(model, ids)[0][0, 0]
    assert weights_TT.diagonal(-1).mean() > 0.8


def test_the_second_head_sees_what_followed_the_same_token(model: PreTrainedModel, ids: Tensor) -> None:
    weights_TT = attentions(model, ids)[1][0, 0]
    again = torch.arange(LENGTH, LENGTH + REPEATED - 1)
    followed = again - LENGTH + LENGTH // 3 + 1
    assert weights_TT[again, followed].mean() > 20 / LENGTH
    assert (weights_TT[again].argmax(-1) == followed).float().mean() > 30 / LENGTH  # by chance 1 / LENGTH


def test_repeated_tokens_are_likelier_than_without_the_head(
    model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    bare = build_model(model.config.model_type, tokenizer, layers=3, width=256, mlp=64).eval()

    def loss(one: PreTrainedModel) -> float:
        one.set_attn_implementation("sdpa")
        with torch.inference_mode():
            logits_TV = one(ids).logits[0, LENGTH:-1]
        return float(torch.nn.functional.cross_entropy(logits_TV, ids[0, LENGTH + 1 :]))

    assert loss(model) < loss(bare) - 0.5


def test_the_same_seed_plants_the_same_head(tokenizer: PreTrainedTokenizerFast) -> None:
    def planted(seed: int) -> Tensor:
        torch.manual_seed(0)
        model = build_model("llama", tokenizer, layers=2, width=128, mlp=64)
        plant_induction_head(model, torch.Generator().manual_seed(seed))
        weight: Tensor = model.model.layers[1].self_attn.k_proj.weight
        return weight

    assert torch.equal(planted(1), planted(1))
    assert not torch.equal(planted(1), planted(2))


def test_a_recitation_asks_for_spans_of_what_stands_before_it(encoder: Encoder) -> None:
    row = encoder.recitation(50, [12, 7, 50], random.Random(3))
    assert len(row.shared) == len(set(row.shared)) == 50
    assert [len(one.ids) for one in row.asked] == [12, 7, 50]
    for one in row.asked:
        start = row.shared.index(one.ids[0])
        assert one.ids == row.shared[start : start + len(one.ids)]
        assert one.echoes == list(range(1, len(one.ids)))
        assert one.question is None


def test_recitations_are_predicted_as_echoes_and_answer_nothing(
    encoder: Encoder, random_model: PreTrainedModel
) -> None:
    row = encoder.recitation(50, [12, 7], random.Random(3))
    batch = collate([row], encoder.pad_id)
    expected = [token for one in row.asked for token in one.ids[1:]]
    assert batch.ids_BT.flatten()[batch.echoes_E].tolist() == expected
    assert batch.questions == []
    assert batch.predicted_W.numel() == 0
    with torch.inference_mode():
        assert token_logits(random_model, batch, batch.echoes_E).isfinite().all()
