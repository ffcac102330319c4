"""Exact match, greedy, on worlds of one split."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.world import Question, Split, WorldConfig, generate_world
from examples.models.recall_training.batches import Batch, Encoder, collate, shuffled

_SEED_BASE = 1 << 48  # training seeds have 48 bits
_QUESTIONS_PER_WORLD = 20
_TOKENS_PER_BATCH = 8_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How many of some questions were answered exactly."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else float("nan")


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
    config = WorldConfig(
        num_facts=num_facts, facts_per_subject=2, two_hop_share=0.3, correction_share=0.15, unknown_share=0.15
    )
    rows = []
    for number in range(num_worlds):
        world = generate_world(config, split=split, seed=_SEED_BASE + number)
        rng = random.Random(number)
        rows.append(encoder.row(world, shuffled(world.questions, _QUESTIONS_PER_WORLD, rng)))
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


def by_group(outcome: Iterable[tuple[Question, bool]]) -> dict[str, Score]:
    """Scores of all, by way of asking, by kind of value and by relation (two-hop questions left out)."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, is_right in outcome:
        right["all"].append(is_right)
        right[f"ask:{question.ask.value}"].append(is_right)
        if question.kind is not None and len(question.relations) == 1:
            right[f"kind:{question.kind.value}"].append(is_right)
            right[f"relation:{question.relations[0]}"].append(is_right)
    return {name: score(values) for name, values in sorted(right.items())}


def score(matches: Sequence[bool]) -> Score:
    return Score(right=sum(matches), asked=len(matches))
