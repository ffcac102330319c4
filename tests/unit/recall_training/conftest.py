"""One tokenizer and one batch of dialogues for all tests: training the tokenizer takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.batches import Batch, Encoder
from examples.models.recall_training.tokens import SYSTEM_PROMPTS, train_tokenizer
from tests.unit.recall_training.plain import Dialogue, draw_dialogue, packed

FAMILIES = ("llama", "qwen3")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by threads that wait for each other than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(4096)


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer)


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    """Of many lengths, with and without a system message and earlier questions."""
    return [
        draw_dialogue(1, num_facts=2, num_questions=3),
        draw_dialogue(2, num_facts=7, num_questions=5),
        draw_dialogue(3, num_facts=3, num_questions=4, num_earlier=2),
        draw_dialogue(4, num_facts=1, num_questions=1, system=SYSTEM_PROMPTS[0]),
        draw_dialogue(5, num_facts=5, num_questions=6, num_earlier=3, system=SYSTEM_PROMPTS[2]),
        draw_dialogue(6, num_facts=4, num_questions=2),
    ]


@pytest.fixture(scope="session")
def batch(encoder: Encoder, dialogues: list[Dialogue]) -> Batch:
    return packed(encoder, dialogues)


@pytest.fixture(scope="session", params=FAMILIES)
def random_model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Tiny and untrained, with weights of a size that shows in the logits what attention saw."""
    torch.manual_seed(0)
    model = build_model(request.param, tokenizer, layers=2, width=128, mlp=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=128**-0.5)
    return model.eval()
