"""One training step: the loss of answers and weighted echoes alone; progress survives a save and load."""

from __future__ import annotations

import argparse
import copy
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.models import train_recall
from examples.models.recall_training import curriculum
from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.batches import Batch, Encoder
from examples.models.recall_training.curriculum import WINDOW, Progress
from examples.models.recall_training.evaluation import token_logits
from examples.models.train_recall import Trainer, make_optimizers
from tests.unit.recall_training.plain import Dialogue


def arguments(out: Path, **others: object) -> argparse.Namespace:
    settings = {"steps": 1000, "minutes": math.inf, "echo_weight": 0.3, "log_every": 10**9}
    return argparse.Namespace(out=out, **(settings | {"muon_lr": 0.02, "lr": 3e-3} | others))


class Gradients(torch.optim.SGD):
    """Changes nothing and keeps the gradients of the latest step."""

    kept: list[torch.Tensor]

    def step(self, closure: object = None) -> None:
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model("llama", tokenizer, layers=1, width=128, mlp=64)


def full_precision(model: PreTrainedModel) -> AbstractContextManager[None]:
    return nullcontext()


def test_step_follows_the_mean_loss_of_answers_and_the_weighted_mean_of_echoes(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    batch: Batch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_recall, "autocast", full_precision)
    model = tiny_model(tokenizer)
    optimizer = Gradients(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["peak_lr"] = 1.0
    trainer = Trainer(args=arguments(tmp_path), encoder=encoder, model=model, optimizers=[optimizer])
    trainer._train_on(batch)

    flat = batch.ids_BT.flatten()
    every = torch.arange(1, len(flat))
    log_probs_WV = token_logits(model, batch, every).log_softmax(dim=-1)
    costs = -log_probs_WV.gather(1, flat[every].unsqueeze(1)).flatten()
    answer_costs = torch.stack([costs[at - 1] for at in batch.predicted_W.tolist()])
    echo_costs = torch.stack([costs[at - 1] for at in batch.echoes_E.tolist()])
    loss = answer_costs.mean() + 0.3 * echo_costs.mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in expected))
    scale = min(1.0, 1.0 / float(norm))
    for found, gradient in zip(optimizer.kept, expected, strict=True):
        torch.testing.assert_close(found, gradient * scale, atol=1e-5, rtol=1e-3)


def test_progress_weights_and_optimizers_survive_a_save_and_load(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, batch: Batch, tmp_path: Path
) -> None:
    args = arguments(tmp_path)
    model = tiny_model(tokenizer)
    saved = Trainer(args=args, encoder=encoder, model=model, optimizers=make_optimizers(model, args))
    for _ in range(2):
        saved._train_on(batch)
    saved.progress.level = 3
    saved.seconds, saved.curve = 12.5, [{"step": 2}]
    saved.save()

    fresh = build_model("llama", tokenizer, layers=1, width=128, mlp=64)
    loaded = Trainer(args=args, encoder=encoder, model=fresh, optimizers=make_optimizers(fresh, args))
    loaded.resume()
    assert loaded.progress == saved.progress
    names = ("step", "seconds", "num_tokens", "curve")
    assert [getattr(loaded, n) for n in names] == [getattr(saved, n) for n in names]
    # The next step is the same one, so optimizers and rates were kept as well.
    for trainer in (saved, loaded):
        trainer._train_on(batch)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_steps", [1, WINDOW - 1, WINDOW, WINDOW + 7])
def test_saved_progress_passes_its_level_at_the_step_of_an_unbroken_run(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, num_steps: int
) -> None:
    steps = [[True, True, True, False]] * (WINDOW // 2) + [[True]] * (3 * WINDOW)
    unbroken = Progress()
    expected = [unbroken.record(copy.copy(matches)) for matches in steps]

    model = tiny_model(tokenizer)
    first = Trainer(args=arguments(tmp_path), encoder=encoder, model=model, optimizers=[])
    found = [first.progress.record(matches) for matches in steps[:num_steps]]
    first.save()
    second = Trainer(args=arguments(tmp_path), encoder=encoder, model=model, optimizers=[])
    second.resume()
    found += [second.progress.record(matches) for matches in steps[num_steps:]]
    assert found == expected
    assert second.progress == unbroken


def test_run_that_goes_on_from_its_checkpoint_ends_as_the_unbroken_one(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum, "WINDOW", 3)
    monkeypatch.setattr(curriculum, "PASS_SHARE", 0.0)  # levels pass after steps 3 and 6
    monkeypatch.setattr(Trainer, "report", lambda trainer: None)
    args = arguments(tmp_path, steps=7, eval_every=4, seed=5, tokens=300, workers=0)

    def trainer() -> Trainer:
        model = tiny_model(tokenizer)
        return Trainer(args=args, encoder=encoder, model=model, optimizers=make_optimizers(model, args))

    unbroken, resumed = trainer(), trainer()
    unbroken.run()
    resumed.resume()
    assert (resumed.step, resumed.progress.level) == (4, 1)
    resumed.run()
    assert unbroken.progress.level == 2
    assert resumed.progress == unbroken.progress
    assert (resumed.step, resumed.num_tokens) == (unbroken.step, unbroken.num_tokens)
    for one, other in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_tokens_are_counted_without_padding(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    batch: Batch,
    dialogues: list[Dialogue],
    tmp_path: Path,
) -> None:
    args, model = arguments(tmp_path), tiny_model(tokenizer)
    trainer = Trainer(args=args, encoder=encoder, model=model, optimizers=make_optimizers(model, args))
    trainer._train_on(batch)
    rows = [dialogue.row(encoder) for dialogue in dialogues]
    assert trainer.num_tokens == sum(len(row.shared) + sum(len(one.ids) for one in row.asked) for row in rows)


def test_without_a_checkpoint_training_begins_at_the_first_level(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = Trainer(args=arguments(tmp_path), encoder=encoder, model=tiny_model(tokenizer), optimizers=[])
    trainer.resume()
    assert (trainer.step, trainer.progress) == (0, Progress())
