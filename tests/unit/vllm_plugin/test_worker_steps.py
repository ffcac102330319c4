"""How long steps take, as it is told to whoever decides what loading saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from kv_agent.vllm_plugin.jobs import StepJobs, StepTime
from tests.unit.vllm_plugin.bench import Bench, capture_job, load_job

FORWARD_S = 0.02


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches(host_bytes=1 << 20)


def steps_told(bench: Bench, jobs: StepJobs, *, idle: bool = False) -> list[StepTime]:
    """Of a step in which vLLM comes to the loads behind the model, as it does without any at once."""
    bench.worker.begin(jobs)
    time.sleep(FORWARD_S)
    bench.worker.start(idle=idle)
    bench.worker.save(jobs)
    return bench.worker.take_report().steps


def test_a_step_takes_as_long_as_its_model(bench: Bench) -> None:
    (step,) = steps_told(bench, StepJobs(num_tokens=5))
    assert (step.num_tokens, step.num_put_back) == (5, 0)
    assert step.seconds >= FORWARD_S


def test_steps_that_nobody_asked_about_or_that_computed_nothing_are_not_told(bench: Bench) -> None:
    assert steps_told(bench, StepJobs()) == []
    assert steps_told(bench, StepJobs(num_tokens=5), idle=True) == []


def test_a_step_tells_what_was_put_back_while_it_computed(bench: Bench) -> None:
    job = load_job(bench.capture(capture_job(16)))
    (step,) = steps_told(bench, StepJobs(num_tokens=5, loads=[replace(job, at_once=True)]))
    assert (step.num_tokens, step.num_put_back) == (5, 16)
    (step,) = steps_told(bench, StepJobs(num_tokens=5, loads=[job]))
    assert step.num_put_back == 0
