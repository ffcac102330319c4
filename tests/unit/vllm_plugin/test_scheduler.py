"""Decisions up to a request's end: who is looked up, what is promised, loaded, probed and told."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest

from kv_agent.chunks import Scope
from kv_agent.vllm_plugin import scheduler
from kv_agent.vllm_plugin.jobs import ProbeJob, WorkerReport
from kv_agent.vllm_plugin.plan import Refusal
from tests.unit.vllm_plugin.builders import FakeCatalog, chain, plan_options, record, tokens_of
from tests.unit.vllm_plugin.scheduling import FRESH, WAIT_S, Desk, FakeRequest, request

NOTHING = {"loads": [], "captures": [], "probes": []}


def jobs_of(desk: Desk) -> dict[str, list[Any]]:
    jobs = desk.side.take_jobs()
    return {"loads": jobs.loads, "captures": jobs.captures, "probes": jobs.probes}


# -- requests that ask for nothing, or wrongly -------------------------------------------------------


@pytest.mark.parametrize("params", [None, {}, {"another_connector": {"x": 1}}, {"kv_agent": None}])
def test_a_request_without_our_fields_is_left_alone(desk: Desk, params: dict[str, Any] | None) -> None:
    plain = FakeRequest(request_id="r", prompt_token_ids=[1, 2, 3, 4, 5], kv_transfer_params=params)
    desk.side.new_request(plain)
    assert desk.side.match("r", 0) == (0, False)
    desk.side.allocated("r", [1, 2], 0)
    plain.num_computed_tokens = 5
    assert desk.side.finished(plain, [1, 2], complete=True) == (False, None)
    assert desk.side.probe_request_ids() == frozenset()
    assert jobs_of(desk) == NOTHING
    assert desk.side.counters == {}


@pytest.mark.parametrize(
    "raw",
    [
        {"typo": 1},
        "plan",
        [1],
        {"scope": {"user_id": ""}},
        {"scope": {"tenant": "x"}},
        {"plan": {"placements": [{"chunk_id": "../../etc/passwd", "start": 0}], "fresh_start": 1}},
        {"plan": {"placements": [{"chunk_id": "0" * 32, "start": -1}], "fresh_start": 1}},
        {"plan": {"placements": []}},
        {"probe": {"start": -1}},
        {"content_start": "soon"},
    ],
)
def test_malformed_fields_are_told_and_the_request_is_served(desk: Desk, raw: object) -> None:
    bad = FakeRequest(request_id="r", prompt_token_ids=[1, 2, 3, 4, 5], kv_transfer_params={"kv_agent": raw})
    served = desk.serve(bad)
    assert "kv_transfer_params.kv_agent" in served.answer["error"]
    assert served.counts == (0, 0, 0, 5)
    assert (served.loads, served.capture, served.blocks_kept) == ((), None, False)
    assert desk.side.counters["rejected_requests|malformed"] == 1


def refused_setup() -> tuple[FakeCatalog, FakeRequest]:
    """A catalog with one chunk, and a request that may have it."""
    (one,) = chain([1, 2, 3, 4])
    return FakeCatalog([one]), request((1, 2, 3, 4, *FRESH), plan=plan_options((one, 0), fresh_start=4))


@pytest.mark.parametrize(
    ("changes", "reason", "captured"),
    [
        ({"cache_salt": None}, Refusal.NO_SALT, True),
        ({"cache_salt": ""}, Refusal.NO_SALT, True),
        ({"lora_request": "adapter"}, Refusal.LORA, False),
        ({"mm_features": ["image"]}, Refusal.MULTIMODAL, False),
        ({"prompt_embeds": "tensor"}, Refusal.MULTIMODAL, False),
        ({"prompt_token_ids": None, "num_prompt_tokens": 7}, Refusal.MULTIMODAL, False),
    ],
)
def test_kv_that_token_ids_do_not_name_is_neither_injected_nor_captured(
    changes: dict[str, Any], reason: Refusal, captured: bool
) -> None:
    catalog, one = refused_setup()
    for name, value in changes.items():
        setattr(one, name, value)
    desk = Desk(catalog)
    served = desk.serve(one)
    desk.close()
    assert list(served.reasons.values()) == [reason]
    assert served.counts == (0, 0, 0, 7)
    assert (served.capture is not None) is captured
    assert desk.side.counters[f"refused_chunks|{reason}"] == 1


def test_without_prefix_caching_no_salt_is_needed() -> None:
    catalog, one = refused_setup()
    one.cache_salt = None
    desk = Desk(catalog, prefix_caching=False)
    served = desk.serve(one)
    desk.close()
    assert served.counts == (4, 0, 0, 3)


def test_without_scope_nothing_is_injected_nor_captured(desk: Desk, catalog: FakeCatalog) -> None:
    mine = record([1, 2, 3, 4], scope=Scope())  # even what belongs to the default user
    catalog.add(mine)
    served = desk.serve(
        request((1, 2, 3, 4, *FRESH), plan=plan_options((mine, 0), fresh_start=4), scope=None)
    )
    assert served.reasons == {mine.key: Refusal.NO_SCOPE}
    assert served.counts == (0, 0, 0, 7)
    assert served.capture is None


# -- asking how many tokens will be loaded ----------------------------------------------------------


@pytest.fixture
def planned(catalog: FakeCatalog) -> FakeRequest:
    """Chunks at [0, 6), [6, 13) and [13, 18), the last one moved there, then a fresh turn."""
    records = [*chain(range(6), range(6, 13)), record(range(13, 18))]
    catalog.add(*records)
    options = plan_options((records[0], 0), (records[1], 6), (records[2], 13), fresh_start=18)
    return request((*range(18), *FRESH), plan=options)


def test_asking_again_gives_the_same_promise_and_starts_nothing(desk: Desk, planned: FakeRequest) -> None:
    desk.side.new_request(planned)
    desk.wait_looked_up()
    for local in (0, 0, 4, 0, 16, 4, 20, 0):
        assert desk.side.match("r", local) == ((18 - local, True) if local < 18 else (0, False))
    assert jobs_of(desk) == NOTHING
    assert set(desk.side.counters) <= {"requests"}


def test_the_scheduler_is_told_to_ask_again_while_the_catalog_is_read(
    desk: Desk, catalog: FakeCatalog, planned: FakeRequest
) -> None:
    catalog.gate.clear()
    desk.side.new_request(planned)
    assert desk.side.match("r", 0) == (None, False)
    assert desk.side.match("r", 4) == (None, False)
    catalog.gate.set()
    assert desk.ask("r", 4) == 14


def test_a_catalog_that_does_not_answer_in_time_counts_as_without_the_chunks(
    desk: Desk, catalog: FakeCatalog, planned: FakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RESOLVE_TIMEOUT_S", 0.0)
    catalog.gate.clear()
    desk.side.new_request(planned)
    assert desk.side.match("r", 0) == (0, False)
    catalog.gate.set()
    desk.wait_looked_up()
    assert desk.side.match("r", 0) == (0, False)  # an answer that comes later is not used
    _, answer, _ = desk.finish(planned)
    assert {refused["reason"] for refused in answer["refused"]} == {Refusal.LATE}
    assert len(answer["refused"]) == 3
    assert (answer["exact"], answer["computed"]) == (0, 21)


def test_a_long_queue_is_waited_for_while_look_ups_end(
    desk: Desk, catalog: FakeCatalog, planned: FakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RESOLVE_TIMEOUT_S", 0.0)
    catalog.gate.clear()
    desk.side.new_request(planned)

    desk.resolver.moved_on = time.monotonic() + WAIT_S  # the one before has just ended
    assert desk.side.match("r", 0) == (None, False)
    desk.resolver.moved_on = time.monotonic() - 1  # nothing has moved since
    assert desk.side.match("r", 0) == (0, False)

    catalog.gate.set()
    desk.wait_looked_up()
    assert desk.resolver.moved_on >= time.monotonic() - WAIT_S


@pytest.mark.parametrize("error", [None, RuntimeError("a bug")])
def test_a_look_up_that_fails_refuses_the_plan_and_the_request_is_computed(
    desk: Desk, catalog: FakeCatalog, planned: FakeRequest, error: Exception | None
) -> None:
    catalog.break_down()
    catalog.broken = error or catalog.broken
    served = desk.serve(planned)
    assert set(served.reasons.values()) == {Refusal.LOOKUP}
    assert served.counts == (0, 0, 0, 21)


def test_a_request_without_a_plan_never_waits_for_the_catalog(desk: Desk, catalog: FakeCatalog) -> None:
    catalog.gate.clear()
    one = request(range(9))
    desk.side.new_request(one)
    assert desk.side.match("r", 0) == (0, False)
    keep, answer, _ = desk.finish(one, [70])
    assert keep
    assert answer["computed"] == 9


# -- loading ----------------------------------------------------------------------------------------


def test_a_local_hit_inside_a_chunk_loads_the_rest_of_it(desk: Desk, planned: FakeRequest) -> None:
    desk.side.new_request(planned)
    assert desk.ask("r", 8) == 10
    desk.side.allocated("r", [31, 32, 33, 34, 35], 10)
    (job,) = desk.side.take_jobs().loads
    assert (job.request_id, job.block_ids) == ("r", (31, 32, 33, 34, 35))
    assert [(load.skip, load.start, load.end, load.delta) for load in job.chunks] == [
        (2, 8, 13, 0),
        (0, 13, 18, 13),
    ]
    token_ids = [job.records[load.key].token_ids for load in job.chunks]
    assert token_ids == [tuple(range(6, 13)), tuple(range(13, 18))]
    assert jobs_of(desk) == NOTHING  # handed over once


@pytest.mark.parametrize("request_id", ["r", "unknown"])
def test_nothing_is_loaded_where_nothing_was_promised(
    desk: Desk, planned: FakeRequest, request_id: str
) -> None:
    desk.side.new_request(planned)
    desk.ask("r", 20)
    desk.side.allocated(request_id, [1, 2, 3], 0)
    assert jobs_of(desk) == NOTHING


def test_reports_about_requests_that_are_gone_are_ignored(desk: Desk, planned: FakeRequest) -> None:
    desk.serve(planned)
    before = dict(desk.side.counters)
    desk.side.report(WorkerReport(loaded={"r": None}, probes={"r": b"1234"}))
    assert desk.side.counters == before


# -- probes -----------------------------------------------------------------------------------------


def test_a_probe_is_made_when_the_prefill_ends_and_its_vector_is_in_the_answer(desk: Desk) -> None:
    one = request(range(9), scope=None, probe={"start": 3, "end": 7})
    desk.side.new_request(one)
    assert desk.side.probe_request_ids() == {"r"}
    assert desk.side.prompt_tokens("r") == 9
    assert jobs_of(desk) == NOTHING

    desk.side.prefill_done("r", [5, 6, 7])
    assert desk.side.take_jobs().probes == [ProbeJob(request_id="r", block_ids=(5, 6, 7), start=3, end=7)]
    assert desk.side.probe_request_ids() == frozenset()

    desk.side.report(WorkerReport(probes={"r": b"\x00\x01\xff"}))
    _, answer, jobs = desk.finish(one, [70])
    assert base64.b64decode(answer["probe"]) == b"\x00\x01\xff"
    assert jobs.captures == []


@pytest.mark.parametrize(
    ("probe", "expected"),
    [({}, (0, 9)), ({"start": 2}, (2, 9)), ({"end": 4}, (0, 4)), ({"start": 8, "end": 400}, (8, 9))],
)
def test_a_probe_is_clamped_to_the_prompt(
    desk: Desk, probe: dict[str, int], expected: tuple[int, int]
) -> None:
    desk.side.new_request(request(range(9), probe=probe))
    desk.side.prefill_done("r", [5, 6, 7])
    (job,) = desk.side.take_jobs().probes
    assert (job.start, job.end) == expected


@pytest.mark.parametrize("probe", [{"start": 9}, {"start": 3, "end": 3}, {"start": 5, "end": 2}])
def test_an_empty_probe_is_told_and_the_request_is_served(desk: Desk, probe: dict[str, int]) -> None:
    one = request(range(9), scope=None, probe=probe)
    desk.side.new_request(one)
    desk.side.prefill_done("r", [5, 6, 7])
    assert jobs_of(desk) == NOTHING
    _, answer, _ = desk.finish(one, [70])
    assert "probe: start" in answer["error"]
    assert "probe" not in answer


def test_a_request_that_ends_before_its_prefill_is_not_probed(desk: Desk) -> None:
    one = request(range(9), probe={})
    desk.side.new_request(one)
    desk.finish(one, complete=False)
    assert desk.side.probe_request_ids() == frozenset()


def test_a_lora_request_is_not_probed(desk: Desk) -> None:
    one = request(range(9), probe={})
    one.lora_request = "adapter"
    desk.side.new_request(one)
    assert desk.side.probe_request_ids() == frozenset()


# -- what is told -----------------------------------------------------------------------------------


def test_the_answer_names_what_was_used_and_by_which_model(desk: Desk, planned: FakeRequest) -> None:
    served = desk.serve(planned)
    assert served.counts == (13, 5, 0, 3)
    placements = planned.kv_transfer_params["kv_agent"]["plan"]["placements"]
    assert served.answer["chunk_ids"] == [placement["chunk_id"] for placement in placements]
    assert served.answer["refused"] == []
    assert served.answer["fingerprint"] == "fp-1"
    assert served.answer["turn_id"] == served.captured.turn_id
    assert "error" not in served.answer


def test_counters_add_up_over_requests(desk: Desk, catalog: FakeCatalog) -> None:
    one, other = record(range(4)), record(range(4, 8))
    catalog.add(one, other)
    options = plan_options((one, 0), (other, 4), (one, 8), fresh_start=10)
    prompt = (*tokens_of([one, other]), *FRESH)  # the third placement reaches into the fresh turn
    desk.serve(request(prompt, "a", plan=options, salt="a"))
    lost = desk.serve(request(prompt, "b", plan=options, salt="b"), failing=[other.key], durable=False)
    desk.lose(lost.captured)

    expected = {
        "tokens|exact": 8,
        "tokens|adapted": 4,
        "tokens|computed": 3 + 7,
        f"refused_chunks|{Refusal.FRESH_TURN}": 2,
        "load_failures|blob is missing": 1,
        "turns|stored": 1,
        "hits|adapted": 1,
        "hits|exact": 1,
        "turns|lost": 1,
    }
    assert {name: desk.side.counters[name] for name in expected} == expected


def test_only_a_request_that_is_alone_waits_for_its_look_up(
    desk: Desk, planned: FakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(scheduler, "wait", lambda _, seconds: waited.append(seconds))
    other = FakeRequest(request_id="other", prompt_token_ids=[1])
    desk.side.new_request(other)
    desk.side.new_request(planned)
    desk.ask("r")
    assert not waited

    desk.side.finished(other, [], complete=False)
    desk.side.finished(planned, [], complete=False)
    desk.side.new_request(planned)
    desk.ask("r")
    assert waited[:1] == [scheduler.ALONE_WAIT_S]
