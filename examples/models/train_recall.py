"""Train a small chat model from scratch to answer from its context, on the world in benchmarks/world.

    python -m examples.models.train_recall --out OUT --minutes 60
    python -m examples.models.train_recall --out OUT --minutes 60   # after a stop: goes on where it was
    python -m examples.models.train_recall --out DEEP --layers 6 --grow-from OUT --minutes 60

Run from the repository root, on a GPU where there is one. ``OUT`` then holds the model, its tokenizer,
``training.json`` (settings, curve, final scores) and ``checkpoint.pt`` (only needed to go on).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.world import Split
from benchmarks.world.exam import by_group
from examples.models.recall_training.architectures import build_model
from examples.models.recall_training.batches import Batch, Encoder
from examples.models.recall_training.curriculum import LEVELS, Batches, Progress, Source
from examples.models.recall_training.evaluation import evaluate, exact_matches, token_logits
from examples.models.recall_training.growth import grow_from
from examples.models.recall_training.induction import plant_induction_head
from examples.models.recall_training.tokens import train_tokenizer

CHECKPOINT = "checkpoint.pt"
EVAL_FACTS = (1, 3, 8, 20)
TEST_FACTS = (1, 3, 8, 20, 40, 80)
WARMUP_STEPS = 30
DESCENT_SHARE = 0.8  # of the run, at its end, over which the learning rate falls
LOWEST_FACTOR = 0.02


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A model in training with everything that a checkpoint keeps."""

    args: argparse.Namespace
    encoder: Encoder
    model: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def share_done(self) -> float:
        steps, minutes = int(self.args.steps), float(self.args.minutes)
        return max(self.step / steps, self.seconds / (minutes * 60))

    def run(self) -> None:
        """Until the steps or the minutes are over; a passed level starts a new stream of batches."""
        mark = time.perf_counter()
        while self.share_done < 1:
            source = Source(seed=self.args.seed, level=self.progress.level, tokens_per_step=self.args.tokens)
            batches = Batches(self.encoder, source, range(self.step, self.args.steps))
            for batch in DataLoader(batches, batch_size=None, num_workers=self.args.workers):
                is_passed = self._train_on(batch.to(self.model.device))
                self.seconds += time.perf_counter() - mark
                if self.step % self.args.eval_every == 0:
                    self.report()
                    self.save()
                mark = time.perf_counter()
                if is_passed or self.share_done >= 1:
                    break

    def _train_on(self, batch: Batch) -> bool:
        """One step; true when it passed a level."""
        self._set_rates()
        wanted = torch.cat([batch.predicted_W, batch.echoes_E])
        with autocast(self.model):
            logits = token_logits(self.model, batch, wanted).float()
        losses = torch.nn.functional.cross_entropy(logits, batch.ids_BT.flatten()[wanted], reduction="none")
        num_answers = len(batch.predicted_W)
        logits_WV, loss = logits[:num_answers].detach(), losses[:num_answers].mean()
        echo_loss = losses[num_answers:].sum() / max(1, len(batch.echoes_E))
        (loss + self.args.echo_weight * echo_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += int((batch.ids_BT != self.encoder.pad_id).sum())
        is_passed = self.progress.record(exact_matches(logits_WV, batch))  # sync: counts decide
        if self.step % self.args.log_every == 0:
            print(
                f"step {self.step} {self.seconds:.0f} s {self.num_tokens / 1e6:.2f} M tokens, "
                f"{LEVELS[self.progress.level]} facts, loss {loss:.3f}, echo {echo_loss:.3f}, "
                f"right {self.progress.right:.3f}",
                flush=True,
            )
        return is_passed

    def _set_rates(self) -> None:
        rise = min(1.0, (self.step + 1) / WARMUP_STEPS)
        fall = min(1.0, (1 - self.share_done) / DESCENT_SHARE)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rise * max(LOWEST_FACTOR, fall)

    def report(self) -> None:
        """Scores on known and on unseen people and phrasings."""
        entry: dict[str, Any] = {
            "step": self.step, "seconds": round(self.seconds), "num_tokens": self.num_tokens,
            "level": self.progress.level,
        }  # fmt: skip
        for split in (Split.TRAIN, Split.VALIDATION):
            entry[split.value] = self.scores(split, EVAL_FACTS, self.args.eval_worlds)
            parts = entry[split.value]["8"]
            shown = " ".join(f"{k} {v:.2f}" for k, v in parts.items() if k.startswith(("ask", "kind")))
            curve = " ".join(f"{n}: {entry[split.value][str(n)]['all']:.3f}" for n in EVAL_FACTS)
            print(f"  {split.value} {curve} | 8 facts: {shown}", flush=True)
        self.curve.append(entry)

    def scores(self, split: Split, counts: tuple[int, ...], num_worlds: int) -> dict[str, dict[str, float]]:
        """Exact match by number of facts and group of questions."""
        found = {}
        for num_facts in counts:
            enough = num_worlds * max(1, 8 // num_facts)
            with autocast(self.model):
                outcome = evaluate(
                    self.model, self.encoder, split=split, num_facts=num_facts, num_worlds=enough
                )
            found[str(num_facts)] = {name: round(s.share, 4) for name, s in by_group(outcome).items()}
        return found

    def save(self) -> None:
        path = self.args.out / CHECKPOINT
        content = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "level": self.progress.level,
            "recent": list(self.progress.recent),
            "step": self.step,
            "seconds": self.seconds,
            "num_tokens": self.num_tokens,
            "curve": self.curve,
        }
        torch.save(content, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        path = self.args.out / CHECKPOINT
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress.level = saved["level"]
        self.progress.recent.extend(saved["recent"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.num_tokens, self.curve = saved["num_tokens"], saved["curve"]

    def finish(self) -> None:
        """Writes the model and its scores on the test split."""
        out: Path = self.args.out
        self.model.to(torch.bfloat16)
        scores = self.scores(Split.TEST, TEST_FACTS, self.args.test_worlds)
        for num_facts, groups in scores.items():
            print(
                f"test, {num_facts} facts: " + " ".join(f"{k} {v:.3f}" for k, v in groups.items()), flush=True
            )
        self.model.save_pretrained(out)
        settings = {name: str(value) for name, value in vars(self.args).items() if name != "out"}
        record = {"settings": settings, "seconds": self.seconds, "num_tokens": self.num_tokens,
                  "steps": self.step, "last_level": LEVELS[self.progress.level], "device": device_name(),
                  "descent_share": DESCENT_SHARE,
                  "test": scores, "curve": self.curve}  # fmt: skip
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def is_gpu() -> bool:
    return torch.cuda.is_available()


def device_name() -> str:
    if is_gpu():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} thread(s) of a CPU"


def autocast(model: PreTrainedModel) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16)


def make_optimizers(model: PreTrainedModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms.

    With AdamW alone nothing is recalled after as many tokens as Muon needs for half of the answers.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def make_trainer(args: argparse.Namespace) -> Trainer:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    known = next((f for f in (args.out, args.grow_from) if f and (f / "tokenizer.json").exists()), None)
    if known:
        tokenizer = AutoTokenizer.from_pretrained(known)
        tokenizer.save_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(args.vocab)
        tokenizer.save_pretrained(args.out)
    model = build_model(args.family, tokenizer, layers=args.layers, width=args.width, mlp=args.mlp)
    if args.grow_from:
        grow_from(AutoModelForCausalLM.from_pretrained(args.grow_from, dtype=torch.float32), model)
    else:
        plant_induction_head(model, torch.Generator().manual_seed(args.seed))
    model.to("cuda" if is_gpu() else "cpu")
    trainer = Trainer(
        args=args, encoder=Encoder(tokenizer), model=model, optimizers=make_optimizers(model, args)
    )
    trainer.resume()
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{args.family}: {num_params / 1e6:.2f} M parameters, {len(tokenizer)} tokens, step {trainer.step}")
    return trainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; resumes what it finds")
    parser.add_argument("--grow-from", type=Path, help="folder of a trained model with fewer layers")
    parser.add_argument("--family", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="the run ends at these or --minutes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training, without evaluation")
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=3e-3, help="of embeddings and norms")
    parser.add_argument("--echo-weight", type=float, default=0.5, help="of what is only copied")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--eval-worlds", type=int, default=10)
    parser.add_argument("--test-worlds", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    trainer = make_trainer(parse_args())
    trainer.run()
    trainer.report()
    trainer.save()
    trainer.finish()


if __name__ == "__main__":
    main()
