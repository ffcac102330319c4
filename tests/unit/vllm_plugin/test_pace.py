"""Loading is decided for where it is faster on a machine whose times are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_agent.vllm_plugin.jobs import StepTime
from kv_agent.vllm_plugin.pace import Pace
from tests.unit.storage.clock import Clock


class Machine:
    """Takes so long for a step, more for each token, and so long for a load, more for each token."""

    def __init__(self, step: float, token: float, load: float, loaded_token: float) -> None:
        self.step, self.token, self.load, self.loaded_token = step, token, load, loaded_token
        self.clock = Clock()
        self.pace = Pace(decides=True, clock=self.clock)

    def computes(self, num_tokens: int, noise: float = 1.0) -> None:
        seconds = (self.step + self.token * num_tokens) * noise
        self.pace.computed(StepTime(num_tokens=num_tokens, seconds=seconds))

    def puts_back(self, num_tokens: int, num_computed: int) -> None:
        """At once: in the step that computes others."""
        computing = self.step + self.token * num_computed
        seconds = computing + self.load + self.loaded_token * num_tokens
        self.pace.computed(StepTime(num_tokens=num_computed, seconds=seconds, num_put_back=num_tokens))

    def loads(self, num_tokens: int, noise: float = 1.0) -> None:
        self.pace.begin_load("r", num_tokens)
        self.clock.now += (self.load + self.loaded_token * num_tokens) * noise
        self.pace.end_load("r", is_whole=True)

    def learns(self, noise: float = 0.0) -> None:
        rng = random.Random(0)
        for num_tokens in (1, 2, 8, 4, 300, 1, 2000, 700, 3):
            self.computes(num_tokens, 1 + rng.uniform(0, noise))
        for num_tokens in (10, 3000, 40, 500, 2000, 100):
            self.loads(num_tokens, 1 + rng.uniform(0, noise))

    def break_even(self) -> float:
        gain = self.token - self.loaded_token
        return self.load / gain if gain > 0 else float("inf")


@given(
    token=st.floats(1e-6, 5e-3),
    load=st.floats(1e-4, 5e-2),
    share=st.floats(0.001, 0.5),
)
def test_it_loads_what_is_longer_than_where_both_are_as_fast(token: float, load: float, share: float) -> None:
    machine = Machine(step=0.03, token=token, load=load, loaded_token=token * share)
    machine.learns()

    assert machine.pace.pays(int(machine.break_even() * 1.5) + 60)
    if (shorter := int(machine.break_even() * 0.7) - 20) > 0:
        assert not machine.pace.pays(shorter)


def test_what_is_put_back_at_once_is_judged_by_steps_that_did_so() -> None:
    machine = Machine(step=0.03, token=1e-3, load=0.02, loaded_token=1e-5)
    machine.learns()
    machine.load = 0.001
    for num_tokens in (10, 3000, 40):
        machine.puts_back(num_tokens, num_computed=32)
    assert machine.pace.pays(1, at_once=True)  # it does not know enough yet
    machine.puts_back(500, num_computed=2000)

    assert not machine.pace.pays(10)
    assert machine.pace.pays(10, at_once=True)
    for _ in range(64):
        machine.load = 0.02
        machine.puts_back(40, num_computed=32)
    assert not machine.pace.pays(10, at_once=True)


def test_noise_moves_the_limit_but_little() -> None:
    machine = Machine(step=0.03, token=1e-3, load=0.02, loaded_token=1e-5)
    machine.learns(noise=0.3)

    assert not machine.pace.pays(10)
    assert machine.pace.pays(60)


def test_where_computing_is_always_faster_nothing_is_loaded() -> None:
    machine = Machine(step=0.001, token=1e-6, load=0.004, loaded_token=1e-5)
    machine.learns()

    assert not any(machine.pace.pays(num_tokens) for num_tokens in (1, 100, 10_000, 1_000_000))


def test_short_loads_that_took_long_by_chance_do_not_keep_long_ones_from_being_tried() -> None:
    machine = Machine(step=0.03, token=1e-3, load=0.005, loaded_token=1e-5)
    for number in range(20):
        machine.computes((1, 300)[number % 2])
        machine.loads(16, noise=1 + 3 * (number % 8))

    assert machine.pace.pays(256)


@pytest.mark.parametrize("missing", ["steps", "small steps", "loads"])
def test_it_loads_until_it_knows_enough(missing: str) -> None:
    machine = Machine(step=0.001, token=1e-6, load=0.004, loaded_token=1e-5)
    for _ in range(10):
        if missing != "small steps":
            machine.computes(2)
        if missing != "steps":
            machine.computes(500)
        if missing != "loads":
            machine.loads(50)

    assert machine.pace.pays(10)


def test_what_was_measured_long_ago_counts_no_more() -> None:
    machine = Machine(step=0.001, token=1e-6, load=0.004, loaded_token=1e-5)
    machine.learns()
    assert not machine.pace.pays(10)

    machine.clock.now += 3600
    assert machine.pace.pays(10)  # and so it is measured anew
    machine.learns()
    assert not machine.pace.pays(10)


def test_a_load_that_failed_or_never_began_is_no_measure() -> None:
    machine = Machine(step=0.001, token=1e-6, load=0.004, loaded_token=1e-5)
    for _ in range(10):
        machine.computes(2)
        machine.computes(500)
        machine.pace.begin_load("failed", 50)
        machine.clock.now += 5
        machine.pace.end_load("failed", is_whole=False)
        machine.pace.end_load("unknown", is_whole=True)

    assert machine.pace.pays(10)


def test_one_that_decides_nothing_always_loads() -> None:
    machine = Machine(step=0.001, token=1e-6, load=0.004, loaded_token=1e-5)
    machine.pace.decides = False
    machine.learns()

    assert machine.pace.pays(1)
