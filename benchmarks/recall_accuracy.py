"""How many questions about its context a model answers exactly, greedily, on vLLM.

    python -m benchmarks.recall_accuracy examples/models/recall

Worlds of the test split, of which the bundled models saw neither people nor phrasings, and the same people
in phrasings of the training. Writes ``accuracy.json`` into the model's folder and prints a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.provenance import provenance
from benchmarks.world import Question, Split
from benchmarks.world.exam import Score, by_group, exam_papers

if TYPE_CHECKING:
    from vllm import LLM

FACTS = (1, 3, 8, 20, 40, 80, 120, 160)
WORDINGS = {"facts": Split.TEST, "known_phrasings": Split.TRAIN}  # names in accuracy.json
MAX_MODEL_LEN = 4096
MAX_ANSWER_TOKENS = 16


Answerer = Callable[[list[list[int]]], list[str]]  # prompts as token ids -> texts


class Sheet(NamedTuple):
    """What a model made of the exam at one number of facts; prompts counted in tokens."""

    outcome: list[tuple[Question, bool]]
    prompt_lengths: list[int]


def sit_exam(
    answer: Answerer,
    tokenizer: Any,
    *,
    num_facts: int,
    num_worlds: int,
    most_prompt_tokens: int,
    wording: Split = Split.TEST,
) -> Sheet:
    """Questions and whether each was answered right; those with longer prompts are left out."""
    asked: list[Question] = []
    prompts: list[list[int]] = []
    papers = exam_papers(Split.TEST, num_facts=num_facts, num_worlds=num_worlds, wording=wording)
    for world, questions in papers:
        for question in questions:
            messages = [*world.messages, {"role": "user", "content": question.text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            if len(ids) <= most_prompt_tokens:
                asked.append(question)
                prompts.append(ids)
    texts = answer(prompts)
    outcome = [(one, text.strip() == one.answer) for one, text in zip(asked, texts, strict=True)]
    return Sheet(outcome, [len(ids) for ids in prompts])


def vllm_answerer(llm: LLM) -> Answerer:
    """Greedy answers of a vLLM engine."""
    from vllm import SamplingParams

    def answer(prompts: list[list[int]]) -> list[str]:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
        return [done.outputs[0].text for done in llm.generate(inputs, sampling, use_tqdm=False)]

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--facts", type=int, nargs="+", default=FACTS)
    parser.add_argument("--questions", type=int, default=1000, help="about as many for each number of facts")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    from vllm import LLM

    llm = LLM(
        model=str(args.model), dtype=args.dtype, max_model_len=MAX_MODEL_LEN, seed=0, enforce_eager=True
    )
    record: dict[str, Any] = {"provenance": provenance(), "dtype": args.dtype}
    for (series, wording), num_facts in product(WORDINGS.items(), args.facts):
        num_worlds = max(args.questions // min(20, max(1, round(1.5 * num_facts))), 1)
        sheet = sit_exam(
            vllm_answerer(llm),
            llm.get_tokenizer(),
            num_facts=num_facts,
            num_worlds=num_worlds,
            most_prompt_tokens=MAX_MODEL_LEN - MAX_ANSWER_TOKENS,
            wording=wording,
        )
        groups = by_group(sheet.outcome)
        lengths = sheet.prompt_lengths
        record.setdefault(series, {})[str(num_facts)] = {
            "mean_prompt_tokens": round(sum(lengths) / len(lengths)),
            "max_prompt_tokens": max(lengths),
            "groups": {name: [score.right, score.asked] for name, score in groups.items()},
        }
        print(f"{wording.value:5} {num_facts:4} facts, {max(lengths):4} tokens: {_line(groups)}", flush=True)
    (args.model / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _line(groups: dict[str, Score]) -> str:
    shown = {name: score for name, score in groups.items() if not name.startswith("relation")}
    return "  ".join(f"{name.split(':')[-1]} {score.share:.3f}" for name, score in shown.items())


if __name__ == "__main__":
    main()
