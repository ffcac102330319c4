"""With ``load="faster"`` a plan is followed where that is the faster way; the answer says which it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kv_agent.vllm_plugin.jobs import ResidentChanges, StepTime, WorkerReport
from kv_agent.vllm_plugin.plan import Refusal
from tests.unit.vllm_plugin.builders import FakeCatalog, chain
from tests.unit.vllm_plugin.scheduling import Desk, request, row


@pytest.fixture
def pacing(catalog: FakeCatalog) -> Iterator[Desk]:
    desk = Desk(catalog, load="faster")
    yield desk
    desk.close()


def teach(desk: Desk, seconds_per_token: float) -> None:
    """Steps of an engine that computes so fast; what loads take is measured as they are served."""
    small = [StepTime(num_tokens=1, seconds=0.01)] * 4
    large = [StepTime(num_tokens=1000, seconds=0.01 + 1000 * seconds_per_token)] * 4
    desk.side.report(WorkerReport(steps=small + large))


def test_where_computing_is_faster_nothing_is_loaded_and_the_reason_is_told(
    pacing: Desk, catalog: FakeCatalog
) -> None:
    records = chain((1, 2, 3, 4), (5, 6, 7, 8))
    catalog.add(*records)
    tokens, plan = row(*records)
    for number in range(4):
        served = pacing.serve(request(tokens, f"r{number}", plan=plan, store=False))
        assert served.counts == (8, 0, 0, 3)  # it does not know yet

    teach(pacing, seconds_per_token=1e-12)
    served = pacing.serve(request(tokens, "computed", plan=plan, store=False))

    assert (served.counts, served.loads) == ((0, 0, 0, 11), ())
    assert set(served.reasons.values()) == {Refusal.FASTER}

    teach(pacing, seconds_per_token=1.0)
    teach(pacing, seconds_per_token=1.0)
    served = pacing.serve(request(tokens, "loaded", plan=plan, store=False))
    assert (served.counts, served.reasons) == ((8, 0, 0, 3), {})


def test_what_is_computed_instead_is_not_stored_again(pacing: Desk, catalog: FakeCatalog) -> None:
    records = chain((1, 2, 3, 4), (5, 6, 7, 8))
    catalog.add(*records)
    tokens, plan = row(*records)
    for number in range(4):
        pacing.serve(request(tokens, f"r{number}", plan=plan, store=False))
    teach(pacing, seconds_per_token=1e-12)

    served = pacing.serve(request(tokens, "computed", plan=plan))

    assert served.counts == (0, 0, 0, 11)
    assert not {segment.key for segment in served.captured.segments} & {one.key for one in records}


def test_the_decision_stands_when_vllm_asks_again(pacing: Desk, catalog: FakeCatalog) -> None:
    records = chain((1, 2, 3, 4), (5, 6, 7, 8))
    catalog.add(*records)
    tokens, plan = row(*records)
    one = request(tokens, "asked twice", plan=plan, store=False)
    for number in range(4):
        pacing.serve(request(tokens, f"r{number}", plan=plan, store=False))
    pacing.side.new_request(one)
    assert pacing.ask("asked twice") == 8

    teach(pacing, seconds_per_token=1e-12)

    assert pacing.ask("asked twice") == 8


def test_only_one_that_decides_asks_how_long_steps_take(pacing: Desk, desk: Desk) -> None:
    assert pacing.side.take_jobs(7).num_tokens == 7
    assert desk.side.take_jobs(7).num_tokens == 0


@pytest.mark.parametrize(("extra_s", "count"), [(0.001, 8), (1.0, 0)])
def test_what_is_in_memory_is_judged_by_what_it_costs_at_once(
    pacing: Desk, catalog: FakeCatalog, extra_s: float, count: int
) -> None:
    records = chain((1, 2, 3, 4), (5, 6, 7, 8))
    catalog.add(*records)
    tokens, plan = row(*records)
    teach(pacing, seconds_per_token=0.01)
    mixed = [StepTime(num_tokens=1, seconds=0.02 + extra_s, num_put_back=8)] * 4
    in_memory = ResidentChanges(number=1, checksums={one.key: one.checksum for one in records})
    pacing.side.report(WorkerReport(steps=mixed, residents=in_memory))

    pacing.side.new_request(request(tokens, "r", plan=plan, store=False))
    pacing.wait_looked_up()

    assert pacing.side.match("r", 0) == (count, False)
