"""Live events: each namespace hears of its own memories, whoever changes them, and what it missed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import WebSocketDenialResponse, WebSocketTestSession

from kv_agent.chunks import Scope, TurnId
from kv_agent.serving import events
from kv_agent.serving.events import Event, EventHub, Listener, follow
from kv_agent.storage.history import History
from kv_agent.storage.retention import Retention
from kv_agent.storage.store import LocalStore
from tests.unit.serving.conftest import Served
from tests.unit.serving.test_routes import ask, error_of, remember

INSERT_EVENT = """
    INSERT INTO turn_events (kind, turn_id, namespace, user_id) VALUES ('stored', 't', 'acme', 'u')
"""
ACME = Scope(namespace="acme", user_id="u")


def retrieved(number: int, scope: Scope = ACME) -> Event:
    return Event(kind="retrieved", scope=scope, ids=(TurnId(str(number)),))


@contextmanager
def listening(served: Served, key: str = "acme", query: str = "") -> Iterator[WebSocketTestSession]:
    with served.client.websocket_connect(f"/memory/stream{query}", headers=served.headers(key)) as stream:
        yield stream


def heard_of(stream: WebSocketTestSession, num_ids: int) -> list[dict[str, Any]]:
    """Events of as many memories together."""
    heard: list[dict[str, Any]] = []
    while sum(len(event["ids"]) for event in heard) < num_ids:
        heard.append(stream.receive_json())
    assert sum(len(event["ids"]) for event in heard) == num_ids
    return heard


def told(stream: WebSocketTestSession, num_ids: int) -> list[tuple[str, str]]:
    """Kind and id of as many memories."""
    return [(event["event"], memory_id) for event in heard_of(stream, num_ids) for memory_id in event["ids"]]


def test_a_listener_has_more_as_long_as_next_need_not_wait() -> None:
    async def heard() -> list[str]:
        listener = Listener()
        assert not listener.has_more
        for number in range(300):  # more than wait for one listener
            listener.offer(str(number))
        texts = []
        while listener.has_more:
            texts.append(await asyncio.wait_for(listener.next(), 1))
        return texts

    *told, lost = asyncio.run(heard())
    assert told == [str(number) for number in range(256)]
    assert json.loads(lost) == {"event": "lost", "count": 44}


def test_what_becomes_of_memories_is_told_in_order(served: Served) -> None:
    with listening(served) as stream:
        before = time.time()
        ids = [remember(served, name, user_id="u", session_id="s") for name in ("Ana", "Bo")]
        stored = heard_of(stream, 2)
        ask(served, "Ana Oslo", user_id="u")
        found = heard_of(stream, 2)
        served.client.delete(f"/memory/{ids[0]}")
        gone = heard_of(stream, 1)

    for event in (*stored, *found, *gone):
        assert before - 1 < event.pop("at") < time.time() + 1
    assert found[0].pop("took_ms") > 0
    where = {"namespace": "acme", "user_id": "u", "agent_id": None, "session_id": "s"}
    assert [memory_id for event in stored for memory_id in event.pop("ids")] == ids
    assert all(event == {"event": "stored", **where} for event in stored)
    assert found == [{"event": "retrieved", **where, "session_id": None, "ids": ids, "mode": "lexical"}]
    assert gone == [{"event": "forgotten", **where, "ids": ids[:1]}]


def test_other_processes_memories_and_evictions_are_told_too(served: Served) -> None:
    with listening(served) as stream:
        kept = [remember(served, name) for name in ("Ana", "Bo")]
        assert told(stream, 2) == [("stored", memory_id) for memory_id in kept]
        served.store.forget([TurnId(kept[0])])  # by another connection to the same store
        assert told(stream, 1) == [("forgotten", kept[0])]
        served.store.set_retention("acme", Retention(max_memories=1))
        last = remember(served, "Cy")
        assert sorted(told(stream, 2)) == sorted([("stored", last), ("evicted", kept[1])])


def test_nobody_hears_of_another_namespace(served: Served) -> None:
    with (
        listening(served) as acme,
        listening(served, "other") as other,
        listening(served, "admin", "?namespace=other") as admin,
    ):
        mine, theirs = remember(served, "Ana"), remember(served, "Bo", key="other")
        assert told(acme, 1) == [("stored", mine)]
        assert told(other, 1) == told(admin, 1) == [("stored", theirs)]
        ask(served, "Bo", key="other")
        remember(served, "Cy")
        assert told(acme, 1)[0][0] == "stored"
        assert told(other, 1) == [("retrieved", theirs)]


def test_a_key_may_stand_in_the_address(served: Served) -> None:
    del served.client.headers["Authorization"]
    with served.client.websocket_connect(f"/memory/stream?key={served.keys['acme']}") as stream:
        assert stream.scope["query_string"] == b""  # what servers log
        stored = remember(served, "Ana")
        assert told(stream, 1) == [("stored", stored)]


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 401), ("?key=", 401), ("?key=wrong", 401), ("?key={acme}&namespace=other", 403)],
)
def test_who_may_not_listen_is_refused(served: Served, query: str, status: int) -> None:
    del served.client.headers["Authorization"]
    query = query.format(**served.keys)

    with (
        pytest.raises(WebSocketDenialResponse) as refused,
        served.client.websocket_connect(f"/memory/stream{query}"),
    ):
        pass

    error_of(refused.value, status)
    assert served.app.state.kv_agent.hub.num_listeners == 0


def test_there_is_an_end_to_listeners(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_LISTENERS", 2)

    with listening(served), listening(served):
        with pytest.raises(WebSocketDenialResponse) as refused, listening(served):
            pass
        error_of(refused.value, 503)
    with listening(served) as stream:
        told_id = remember(served, "Ana")
        assert told(stream, 1) == [("stored", told_id)]


def test_a_listener_that_left_is_forgotten(served: Served) -> None:
    hub = served.app.state.kv_agent.hub
    for _ in range(5):
        with listening(served):
            assert hub.num_listeners == 1
    assert hub.num_listeners == 0
    remember(served, "Ana")


def test_what_a_listener_says_is_of_no_interest(served: Served) -> None:
    with listening(served) as stream:
        for text in ("", "{", "x" * 100_000):
            stream.send_text(text)
        stream.send_bytes(b"\xff")
        told_id = remember(served, "Ana")
        assert told(stream, 1) == [("stored", told_id)]


@given(steps=st.lists(st.one_of(st.integers(1, 700), st.just("read")), max_size=40))
def test_a_slow_listener_gets_events_in_order_and_is_told_how_many_it_missed_where(
    steps: list[Any],
) -> None:
    async def run() -> list[str]:
        listener = Listener()
        number = 0
        got: list[str] = []
        for step in steps:
            if step == "read":
                for _ in range(100):
                    if listener._waiting.empty() and not listener._num_lost:
                        break
                    got.append(await listener.next())
            else:
                for _ in range(step):
                    listener.offer(str(number))
                    number += 1
        while not listener._waiting.empty() or listener._num_lost:
            got.append(await listener.next())
        return [*got, str(number)]

    expected = 0
    for text in asyncio.run(run()):
        value = json.loads(text)
        if isinstance(value, dict):
            assert value.keys() == {"event", "count"}
            assert value["event"] == "lost"
            assert value["count"] > 0
            expected += value["count"]
        else:
            assert value == expected
            expected += 1


def test_events_of_many_threads_reach_a_thousand_listeners() -> None:
    num_threads, per_thread, num_listeners = 8, 20, 1000

    async def run() -> list[list[str]]:
        hub = EventHub(asyncio.get_running_loop())
        listeners = [hub.add("acme") for _ in range(num_listeners)]
        quiet = hub.add("other")
        threads = [
            threading.Thread(
                target=lambda n=n: [hub.publish(retrieved(n * 100 + i)) for i in range(per_thread)]
            )
            for n in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        heard = [
            [json.loads(await listener.next())["ids"][0] for _ in range(num_threads * per_thread)]
            for listener in listeners
        ]
        for thread in threads:
            thread.join()
        assert quiet._waiting.empty()
        return heard

    heard = asyncio.run(run())
    published = {str(n * 100 + i) for n in range(num_threads) for i in range(per_thread)}
    assert all(ids == heard[0] for ids in heard)
    assert set(heard[0]) == published
    for n in range(num_threads):  # each thread's own in its order
        own = [int(one) for one in heard[0] if int(one) // 100 == n]
        assert own == sorted(own)


def test_trouble_with_the_store_is_told_once_and_events_go_on_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path / "store", host_bytes=0)

    async def run(history: History) -> str:
        hub = EventHub(asyncio.get_running_loop())
        listener = hub.add("acme")
        following = asyncio.create_task(follow(history, hub, poll_s=0.001))
        try:
            await asyncio.sleep(0.05)
            fail.clear()
            await asyncio.sleep(0.05)
            with store.catalog._transaction() as db:
                db.execute(INSERT_EVENT)
            return await listener.next()
        finally:
            following.cancel()

    fail = threading.Event()
    fail.set()

    def transaction(begin: str) -> Any:
        if fail.is_set():
            raise events.StorageError("away")
        return store.catalog._transaction(begin)

    assert json.loads(asyncio.run(run(History(transaction))))["ids"] == ["t"]
    assert [record.message for record in caplog.records] == ["no events of the store while this lasts: away"]
    store.close()
