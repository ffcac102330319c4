"""Exact match, greedy, on worlds of one split."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.world import Question, Split
from benchmarks.world.exam import exam_papers
from examples.models.recall_training.batches import Batch, Encoder, collate

_TOKENS_PER_BATCH = 8_000


def token_logits(model: PreTrainedModel, batch: Batch, wanted_W: Tensor) -> Tensor:
    """Logits that predict the wanted tokens, given as indices into B*T, and only those -> [W, vocabulary]."""
    hidden_BTC = model.model(
        input_ids=batch.ids_BT,
        position_ids=batch.positions_BT,
        use_cache=False,
        layout=batch.layout,
    ).last_hidden_state
    hidden_WC = hidden_BTC.flatten(0, 1)[wanted_W - 1]  # each token is predicted one before it
    logits_WV: Tensor = model.lm_head(hidden_WC)
    return logits_WV


def exact_matches(logits_WV: Tensor, batch: Batch) -> list[bool]:
    """Whether greedy decoding gives the answer and stops, by question.

    Greedy decoding reproduces a text exactly when every token of it is the likeliest after those before.
    """
    is_right_W = logits_WV.argmax(dim=-1) == batch.ids_BT.flatten()[batch.predicted_W]
    num_wrong_A = torch.zeros(len(batch.questions), device=is_right_W.device).index_add_(
        0, batch.answer_ids_W, (~is_right_W).float()
    )
    return (num_wrong_A == 0).tolist()


def evaluate(
    model: PreTrainedModel, encoder: Encoder, *, split: Split, num_facts: int, num_worlds: int
) -> list[tuple[Question, bool]]:
    """Questions about worlds of ``num_facts`` facts and whether each was answered right."""
    papers = exam_papers(split, num_facts=num_facts, num_worlds=num_worlds)
    rows = [encoder.row(world, questions) for world, questions in papers]
    longest = max(len(row.shared) + sum(len(one.ids) for one in row.asked) for row in rows)
    size = max(1, _TOKENS_PER_BATCH // longest)
    device = next(model.parameters()).device
    outcome: list[tuple[Question, bool]] = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size], encoder.pad_id).to(device)
            matches = exact_matches(token_logits(model, batch, batch.predicted_W), batch)
            outcome += zip(batch.questions, matches, strict=True)
    model.train()
    return outcome
