"""vLLM's scheduler thread never waits for a disk: look-ups run elsewhere, decisions touch memory alone."""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import faiss
import numpy as np
import pytest

from kv_agent.chunks import ChunkRecord, Scope, TurnId
from kv_agent.storage.catalog import Catalog
from kv_agent.vllm_plugin.plan import Refusal
from tests.unit.storage.builders import turn_of
from tests.unit.vllm_plugin.builders import SCOPE, FakeCatalog, chain, plan_options, record, tokens_of
from tests.unit.vllm_plugin.scheduling import FRESH, Desk, FakeRequest, request, row

OUR_OWN = ("kv_agent.storage", "kv_agent.retrieval")  # none of it belongs on that thread
LIBRARIES = ("sqlite3", "faiss", "_swigfaiss")
FILES = ("_io", "io", "posix")
HARMLESS = {"urandom", "getpid", "fspath"}  # of ``posix``: no file


class Calls:
    """Calls that may wait for a disk, by the name of the thread that made them."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """As ``sys.setprofile`` wants it: sees every function of the thread, those written in C, too."""
        if event == "call":
            module = str(frame.f_globals.get("__name__"))
            if module.startswith((*OUR_OWN, *LIBRARIES)):
                self.note(f"{module}.{frame.f_code.co_name}")
        elif event == "c_call":
            module = arg.__module__ or type(arg.__self__).__module__
            if module.startswith((*FILES, *LIBRARIES)) and arg.__name__ not in HARMLESS:
                self.note(f"{module}.{arg.__name__}")

    def note(self, what: str) -> None:
        self.found.append((threading.current_thread().name, what))

    def on(self, thread: str) -> list[str]:
        return [what for name, what in self.found if name.startswith(thread)]


_watching: list[Calls] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """What the interpreter itself tells of: files opened in whatever way."""
    if _watching and (event == "open" or event.startswith(("os.", "sqlite3."))):
        _watching[-1].note(event)


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    sys.addaudithook(_audit)  # for good: there is no way to take one away


@contextmanager
def watched() -> Iterator[Calls]:
    """Notes the calls of this thread and of those that are started meanwhile."""
    calls = Calls()
    gc.collect()
    gc.disable()  # what others left behind may have a connection or a file to close
    _watching.append(calls)
    threading.setprofile(calls)
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        _watching.pop()
        gc.enable()


class StoredRecords(Catalog):
    """A real catalog that is filled as the fake one is."""

    gate = threading.Event()

    def add(self, *records: ChunkRecord) -> None:
        for one in records:
            turn = turn_of([one], f"turn of {one.key}", Scope(namespace=one.namespace, user_id=one.user_id))
            self.add_turn(turn, [], [one], {})


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[StoredRecords]:
    catalog = StoredRecords(tmp_path / "catalog.sqlite3")
    yield catalog
    catalog.close()


@pytest.fixture
def stored(catalog: StoredRecords) -> list[ChunkRecord]:
    """Two chunks of a sequence, one of another, and one of somebody else."""
    records = [
        *chain(range(6), range(6, 13)),
        record(range(20, 25), start=50),
        record(range(30, 34), scope=Scope(namespace=SCOPE.namespace, user_id="eve")),
    ]
    catalog.add(*records)
    return records


def serve_all(desk: Desk, stored: list[ChunkRecord]) -> dict[str, Any]:
    """A hit, a refusal, a capture, a probe, a failed load, a malformed and a plain request -> answers."""
    *mine, hers = stored
    prompt, plan = row(*mine)
    hit = desk.serve(request(prompt, "hit", plan=plan, salt="hit"), durable=False)
    not_mine = plan_options((hers, 0), fresh_start=hers.num_tokens)
    refused = desk.serve(request((*tokens_of([hers]), *FRESH), "refused", plan=not_mine), durable=False)
    capture = desk.serve(request(range(40), "capture"), outputs=(70, 71, 72), durable=False)
    failed = desk.serve(
        request(prompt, "failed", plan=plan, salt="failed"), failing=[mine[1].key], durable=False
    )
    probing = request(range(9), "probe", probe={"start": 2, "end": 7}, store=False)
    desk.side.new_request(probing)
    desk.load(probing)
    desk.side.prefill_done("probe", [5, 6, 7])
    desk.finish(probing, [70])
    desk.lose(hit.captured)
    desk.serve(FakeRequest(request_id="bad", prompt_token_ids=[1, 2], kv_transfer_params={"kv_agent": 1}))
    plain = FakeRequest(request_id="plain", prompt_token_ids=[1, 2])
    desk.side.new_request(plain)
    desk.side.match("plain", 0)
    desk.side.finished(plain, [1], complete=True)
    return {"hit": hit, "refused": refused, "capture": capture, "failed": failed}


def test_no_call_on_the_scheduler_s_thread_may_wait_for_a_disk(
    catalog: StoredRecords, stored: list[ChunkRecord]
) -> None:
    with watched() as calls:
        desk = Desk(catalog)
        answers = serve_all(desk, stored)
        desk.close()

    assert calls.on(threading.current_thread().name) == []
    assert "sqlite3.execute" in calls.on("kv-agent-resolver")  # that is where it happens
    # And they lived the lives that are meant here:
    assert answers["hit"].counts == (13, 5, 0, 3)
    assert list(answers["refused"].reasons.values()) == [Refusal.USER]
    assert answers["capture"].captured.segments
    assert answers["failed"].counts == (4, 0, 0, 17)


def look_up_here(catalog: Catalog, tmp_path: Path) -> None:
    catalog.known_turns([TurnId("turn")])


def open_a_file(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")


def look_at_a_file(catalog: Catalog, tmp_path: Path) -> None:
    os.stat(tmp_path)


def list_a_folder(catalog: Catalog, tmp_path: Path) -> None:
    os.listdir(tmp_path)


def connect_anew(catalog: Catalog, tmp_path: Path) -> None:
    sqlite3.connect(":memory:").close()


def search_an_index(catalog: Catalog, tmp_path: Path) -> None:
    faiss.IndexFlatIP(4).search(np.zeros((1, 4), dtype=np.float32), 1)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (look_up_here, "sqlite3.execute"),
        (open_a_file, "open"),
        (look_at_a_file, "posix.stat"),
        (list_a_folder, "os.listdir"),
        (connect_anew, "sqlite3.connect"),
        (search_an_index, "faiss"),
    ],
)
def test_a_call_that_is_put_there_is_found(
    catalog: StoredRecords, tmp_path: Path, work: Callable[[Catalog, Path], None], told: str
) -> None:
    desk = Desk(FakeCatalog())
    decide = desk.side._settle

    def settle(state: Any) -> bool:
        work(catalog, tmp_path)
        return decide(state)

    desk.side._settle = settle
    with watched() as calls:
        desk.serve(request(range(9)))
    desk.close()

    assert any(what.startswith(told) for what in calls.on(threading.current_thread().name))
