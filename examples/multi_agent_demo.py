"""Two agents learn, their engine is shut down, and a third agent in a new process answers from their memory.

Every question is answered three ways on the same engine: without memory, by reading the whole history again
as text, and with the nearest memories put back as KV cache. Run it with ``make demo``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kv_agent import AgentMemory, CacheManager
from kv_agent.engines.base import Call, Reuse

TOP_K = 5
REPLY = "I will remember that."

# agent -> sessions -> what its user told it, one turn per sentence
LESSONS = {
    "planner": [
        "Project Golden Flame takes place in Port Hudson. Project Silent Comet takes place in Lake Eden. "
        "Project Iron Panther takes place in Cape Marlow. Project Misty Harvest takes place in Fort Dover. "
        "Project Lunar Island takes place in New Sutton.",
        "The access code of project Golden Flame is tango. The access code of project Silent Comet is "
        "pepper. The access code of project Iron Panther is walrus. The access code of project Misty Harvest "
        "is domino.",
        "The budget of project Golden Flame is 45600 dollars. Project Silent Comet may spend 81200 dollars. "
        "The budget of project Iron Panther is 23900 dollars.",
        "Vera Khan leads project Golden Flame. The lead of project Silent Comet is Hugo Thomsen. "
        "Project Iron Panther is led by Nina Okafor. Otto Flores leads project Lunar Island.",
    ],
    "researcher": [
        "Hugo Thomsen lives in Paris. Vera Khan lives in Boston. Clara Mueller lives in Seoul. "
        "Otto Flores lives in Hanoi. Nina Okafor lives in Porto. Sven Chandra lives in Cairo. "
        "Tessa Novak lives in Turin.",
        "Rosa Bishop has a parrot at home. Felix Bianchi has a goat at home. Hanna Maas has a turtle at "
        "home. Ivan Pereira has a rabbit at home. Zara Meyer has a duck at home.",
        "The badge number of Lena Holm is 4271. The badge number of Amir Horvat is 9038. "
        "The office of Cora Soto is room 615. The office of Joel Vargas is room 207.",
        "Mara Dubois works as a pilot. Kofi Atwood works as a chemist. Kofi Gomez works as a judge. "
        "Emil Fenwick works as a baker. Nils Roth works as a tailor. Dora Adler works as a welder.",
        "Hugo Thomsen moved to Dublin. The new office of Joel Vargas is room 940.",
    ],
}
QUESTIONS = [
    ("Where does project Misty Harvest take place?", "Fort Dover"),
    ("What is the password of project Iron Panther?", "walrus"),
    ("How much may project Golden Flame spend?", "45600"),
    ("Who leads project Silent Comet?", "Hugo Thomsen"),
    ("Where does Hugo Thomsen live?", "Dublin"),
    ("Where does Otto Flores live?", "Hanoi"),
    ("What pet does Felix Bianchi have?", "goat"),
    ("Which animal belongs to Ivan Pereira?", "rabbit"),
    ("Which badge does Amir Horvat wear?", "9038"),
    ("In which room does Joel Vargas sit?", "940"),
    ("What does Kofi Gomez do for work?", "judge"),
    ("What is the profession of Nils Roth?", "tailor"),
]


class Result(NamedTuple):
    """One answer: its text, where its prompt's KV came from, seconds to the first token."""

    text: str
    reuse: Reuse
    ttft_s: float


def sentences(text: str) -> list[str]:
    return [sentence + "." for sentence in text.rstrip(".").split(". ")]


def say(text: str) -> None:
    print(text, flush=True)


def open_manager(store: Path) -> CacheManager:
    say("  starting a vLLM engine (about half a minute) ...")
    started = time.perf_counter()
    manager = CacheManager(engine="vllm", store=store)
    say(f"  engine ready after {time.perf_counter() - started:.0f} s")
    return manager


def learn(store: Path) -> None:
    """First process: the agents store what they are told."""
    with open_manager(store) as manager:
        for agent, sessions in LESSONS.items():
            for number, session in enumerate(sessions, start=1):
                facts = sentences(session)
                memory = AgentMemory(manager, user_id="team", agent_id=agent, session_id=f"{agent}-{number}")
                for fact in facts:
                    memory.store(fact, REPLY)
                say(f"  {agent}, session {number}: learned {len(facts)} facts")
        manager.wait_durable()
        stats = manager.stats()
        size = stats["bytes"] / 1e6
        say(f"  on disk: {stats['turns']} memories, {stats['tokens']} tokens, {size:.1f} MB of KV")
    say("  engine shut down")


def ask(store: Path) -> None:
    """Second process: an agent that never saw the text is asked about it."""
    with open_manager(store) as manager:
        analyst = AgentMemory(manager, user_id="team", agent_id="analyst")
        prompts = manager.prompts
        facts = [fact for sessions in LESSONS.values() for session in sessions for fact in sentences(session)]
        history = [token for fact in facts for token in prompts.turn(fact, REPLY)]

        def plain(question: str, before: Sequence[int]) -> Result:
            # A salt of its own: nothing is in vLLM's prefix cache, as for any new agent or engine.
            salt = f"{question} {len(before)}"
            token_ids = (*prompts.prefix(), *before, *prompts.fresh(question).token_ids)
            done = manager.run(Call(token_ids=token_ids, max_tokens=8, cache_salt=salt))
            return Result(done.text.strip(), done.reuse, done.ttft_s)

        def remembering(question: str) -> Result:
            answer = analyst.generate(question, top_k=TOP_K, max_tokens=8, store=False)
            return Result(answer.text, answer.reuse, answer.ttft_s)

        ways: dict[str, Callable[[str], Result]] = {
            "no memory": lambda question: plain(question, ()),
            "re-reading": lambda question: plain(question, history),
            "KV memory": remembering,
        }
        for way in ways.values():
            way("Are you ready?")  # the first request of each kind is slower
        say(f"  the analyst is asked {len(QUESTIONS)} questions, {len(ways)} ways each\n")
        results: dict[str, list[Result]] = {name: [] for name in ways}
        hits = dict.fromkeys(ways, 0)
        say(f"  {'question':<46}{'right':<14}" + "".join(f"{name:<24}" for name in ways))
        for question, right in QUESTIONS:
            row = f"  {question:<46}{right:<14}"
            for name, way in ways.items():
                result = way(question)
                results[name].append(result)
                hits[name] += (known := right.lower() in result.text.lower())
                row += f"{('+ ' if known else '- ') + result.text:<24.22}"
            say(row)
        say("")
        print_totals(hits, results)


def print_totals(hits: dict[str, int], results: dict[str, list[Result]]) -> None:
    def line(title: str, values: Iterable[str]) -> None:
        say(f"  {title:<60}" + "".join(f"{value:<24}" for value in values))

    columns = results.values()
    exact = [sum(result.reuse.exact for result in column) for column in columns]
    moved = [sum(result.reuse.adapted for result in column) for column in columns]
    line("right answers", (f"{count} of {len(QUESTIONS)}" for count in hits.values()))
    line("prompt tokens computed", (str(sum(r.reuse.computed for r in column)) for column in columns))
    line("prompt tokens injected as KV", (str(e + m) for e, m in zip(exact, moved, strict=True)))
    line("  at their own place / moved", (f"{e} / {m}" for e, m in zip(exact, moved, strict=True)))
    times_ms = (1000 * statistics.median(result.ttft_s for result in column) for column in columns)
    line("time to first token, search included (median)", (f"{time_ms:.0f} ms" for time_ms in times_ms))


def main() -> None:
    if len(sys.argv) == 3:
        {"learn": learn, "ask": ask}[sys.argv[1]](Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory(prefix="kv_agent_demo_") as folder:
        log_path = Path(folder) / "engine.log"
        env = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ | {"PYTHONWARNINGS": "ignore"}
        for title, phase in (
            ("1. Two agents learn from their users", "learn"),
            ("2. A new process, a new engine, a third agent", "ask"),
        ):
            say(f"\n{title}")
            with log_path.open("w") as log:
                done = subprocess.run(
                    [sys.executable, __file__, phase, f"{folder}/store"], stderr=log, env=env
                )
            if done.returncode != 0:
                sys.exit(f"the demo failed; the end of the engine's log:\n{log_path.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
