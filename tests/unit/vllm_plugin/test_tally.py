"""What is counted reaches vLLM's statistics once, whatever is taken when."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from pathlib import Path

from kv_agent.vllm_plugin.tally import COUNTERS, GAUGES, Tally, merge

PLUGIN = Path(__file__).resolve().parents[3] / "kv_agent" / "vllm_plugin"


def test_what_was_taken_adds_up_to_what_was_counted() -> None:
    rng = random.Random(0)
    tally, counted = Tally(), Counter[str]()
    arrived: dict[str, dict[str, float]] = {}
    for _ in range(500):
        if rng.random() < 0.7:
            counted[f"tokens|{rng.choice('abc')}"] += rng.randint(1, 9)
        if rng.random() < 0.5:
            arrived = merge(arrived, tally.take(counted))
    arrived = merge(arrived, tally.take(counted))

    assert arrived["counters"] == counted
    assert tally.take(counted) == {}


def test_gauges_are_looked_at_now_and_then_and_the_latest_counts() -> None:
    now, looks = 0.0, 0

    def gauges() -> dict[str, float]:
        nonlocal looks
        looks += 1
        return {"queue_bytes|write": float(looks)}

    tally = Tally(gauges, clock=lambda: now)
    arrived: dict[str, dict[str, float]] = {}
    for _ in range(100):
        arrived = merge(arrived, tally.take({}))
        now += 0.1

    assert looks == 10
    assert arrived == {"gauges": {"queue_bytes|write": 10.0}}


def test_families_have_a_label_and_a_sentence() -> None:
    for families in (COUNTERS, GAUGES):
        assert all(one.label.isidentifier() and len(one.about) > 20 for one in families.values())
    assert not COUNTERS.keys() & GAUGES.keys()


def test_what_the_plugin_counts_is_known_from_the_start() -> None:
    """As far as the code writes it out."""
    sources = [path.read_text(encoding="utf-8") for path in PLUGIN.glob("*.py")]
    counted = {name for source in sources for name in re.findall(r'"(\w+)\|([a-z ]+)"', source)}
    assert len(counted) > 8
    for family, value in counted:
        assert family in GAUGES or value in COUNTERS[family].known, f"{family}|{value}"

    reasons = set()
    for node in ast.walk(ast.parse((PLUGIN / "loading.py").read_text(encoding="utf-8"))):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="reason")], value=said)
                | ast.keyword(arg="reason", value=said)
            ):
                reasons |= {one.value for one in ast.walk(said) if isinstance(one, ast.Constant)}
    assert reasons == set(COUNTERS["load_failures"].known)
