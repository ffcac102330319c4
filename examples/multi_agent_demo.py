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
from collections.abc import Callable, Sequence
from pathlib import Path

from kv_agent import AgentMemory, CacheManager
from kv_agent.engines.base import Call, Completion

TOP_K = 2
REPLY = "I will remember that."

# agent -> sessions -> what its user told it
LESSONS = {
    "planner": [
        [
            f"Project {name} runs in {city}."
            for name, city in (
                ("Falcon", "Oslo"),
                ("Nimbus", "Kyoto"),
                ("Titan", "Lima"),
                ("Orion", "Quito"),
                ("Delta", "Rome"),
                ("Ember", "Delhi"),
                ("Atlas", "Dakar"),
                ("Sigma", "Perth"),
            )
        ],
        [
            f"The access code of project {name} is {code}."
            for name, code in (
                ("Lotus", "tango"),
                ("Quartz", "river"),
                ("Matrix", "amber"),
                ("Zephyr", "pearl"),
            )
        ],
        [
            f"{name} works as a {job}."
            for name, job in (
                ("Mara", "pilot"),
                ("Kofi", "chemist"),
                ("Tara", "judge"),
                ("Emil", "baker"),
                ("Yuri", "poet"),
                ("Nils", "tailor"),
                ("Dora", "coach"),
                ("Gus", "miner"),
            )
        ],
    ],
    "researcher": [
        [
            f"{name} lives in {city}."
            for name, city in (
                ("Hugo", "Paris"),
                ("Vera", "Boston"),
                ("Cara", "Seoul"),
                ("Otto", "Hanoi"),
                ("Sven", "Porto"),
                ("Pia", "Cairo"),
                ("Theo", "Turin"),
                ("Uma", "Tunis"),
            )
        ],
        [
            f"{name} has a {animal} at home."
            for name, animal in (
                ("Rosa", "parrot"),
                ("Finn", "goat"),
                ("Hana", "turtle"),
                ("Ivan", "rabbit"),
                ("Zane", "duck"),
            )
        ],
        [
            f"{name} loves to eat {food}."
            for name, food in (("Lena", "mango"), ("Amir", "pasta"), ("Cleo", "figs"), ("Jude", "soup"))
        ],
        [
            f"The favorite color of {name} is {color}."
            for name, color in (
                ("Omar", "teal"),
                ("Zoe", "green"),
                ("Liam", "pink"),
                ("Wren", "gold"),
                ("Iris", "cyan"),
            )
        ],
    ],
}
QUESTIONS = [
    ("Where does project Falcon run?", "Oslo"),
    ("Where does project Orion run?", "Quito"),
    ("What is the access code of project Lotus?", "tango"),
    ("What does Mara do for work?", "pilot"),
    ("What does Nils do for work?", "tailor"),
    ("Where does Hugo live?", "Paris"),
    ("Where does Theo live?", "Turin"),
    ("What pet does Rosa have?", "parrot"),
    ("What pet does Ivan have?", "rabbit"),
    ("What does Lena love to eat?", "mango"),
    ("What is the favorite color of Omar?", "teal"),
    ("What is the favorite color of Iris?", "cyan"),
]


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
            for number, facts in enumerate(sessions, start=1):
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
        facts = [fact for sessions in LESSONS.values() for session in sessions for fact in session]
        history = [token for fact in facts for token in prompts.turn(fact, REPLY)]

        def plain(question: str, before: Sequence[int]) -> Completion:
            # A salt of its own: nothing is in vLLM's prefix cache, as for any new agent or engine.
            token_ids = (*prompts.prefix(), *before, *prompts.fresh(question).token_ids)
            return manager.run(
                Call(token_ids=token_ids, max_tokens=8, cache_salt=question + str(len(before)))
            )

        def remembering(question: str) -> Completion:
            answer = analyst.generate(question, top_k=TOP_K, max_tokens=8, store=False)
            return Completion(
                text=answer.text,
                reuse=answer.reuse,
                ttft_s=answer.ttft_s,
                token_ids=(),
                turn_id=None,
                probe=None,
            )

        ways: dict[str, Callable[[str], Completion]] = {
            "no memory": lambda question: plain(question, ()),
            "re-reading": lambda question: plain(question, history),
            "KV memory": remembering,
        }
        for way in ways.values():
            way("Are you ready?")  # the first request of each kind is slower
        say(f"  the analyst is asked {len(QUESTIONS)} questions, {len(ways)} ways each\n")
        results = {name: [] for name in ways}
        say(f"  {'question':<43}{'right':<9}" + "".join(f"{name:<24}" for name in ways))
        for question, right in QUESTIONS:
            row = f"  {question:<43}{right:<9}"
            for name, way in ways.items():
                done = way(question)
                results[name].append((right.lower() in done.text.lower(), done))
                row += f"{('+ ' if results[name][-1][0] else '- ') + done.text.strip():<24}"
            say(row)
        say("")
        print_totals(results)


def print_totals(results: dict[str, list[tuple[bool, Completion]]]) -> None:
    def total(name: str, value: Callable[[Completion], int]) -> int:
        return sum(value(done) for _, done in results[name])

    lines: list[tuple[str, Callable[[str], str]]] = [
        ("right answers", lambda n: f"{sum(ok for ok, _ in results[n])} of {len(results[n])}"),
        ("prompt tokens computed", lambda n: str(total(n, lambda d: d.reuse.computed))),
        ("tokens injected as KV", lambda n: str(total(n, lambda d: d.reuse.exact + d.reuse.adapted))),
        (
            "  of them exact / moved",
            lambda n: " / ".join(
                str(total(n, get)) for get in (lambda d: d.reuse.exact, lambda d: d.reuse.adapted)
            ),
        ),
        (
            "time to first token",
            lambda n: f"{1000 * statistics.median(d.ttft_s for _, d in results[n]):.0f} ms",
        ),
    ]
    for title, value in lines:
        say(f"  {title:<52}" + "".join(f"{value(name):<24}" for name in results))


def main() -> None:
    if len(sys.argv) == 3:
        {"learn": learn, "ask": ask}[sys.argv[1]](Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory(prefix="kv_agent_demo_") as folder:
        log_path = Path(folder) / "engine.log"
        env = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, "PYTHONWARNINGS": "ignore"}
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
