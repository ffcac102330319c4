"""One tokenizer and one set of packed dialogues for all tests: training the tokenizer takes seconds."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.batches import Batch, Encoder
from examples.models.recall_training.tokens import train_tokenizer
from tests.unit.recall_training.plain import Dialogue, draw_dialogue, packed

FAMILIES = ("llama", "qwen3")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(4096)


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer)


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    """Of many lengths, chained and not: several in one packed row, and more than one packed row."""
    return [
        draw_dialogue(1, num_facts=2, num_questions=3),
        draw_dialogue(2, num_facts=7, num_questions=5),
        draw_dialogue(3, num_facts=3, num_questions=4, is_chain=True),
        draw_dialogue(4, num_facts=1, num_questions=1),
        draw_dialogue(5, num_facts=5, num_questions=6, is_chain=True),
        draw_dialogue(6, num_facts=4, num_questions=2),
    ]


@pytest.fixture(scope="session")
def batch(encoder: Encoder, dialogues: list[Dialogue]) -> Batch:
    return packed(encoder, dialogues)


@pytest.fixture(scope="session", params=FAMILIES)
def random_model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Tiny and untrained, with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = build_model(request.param, tokenizer, layers=2, width=128, mlp=64)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()
