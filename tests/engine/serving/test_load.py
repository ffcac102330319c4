"""A crowd on a real server: 100 clients chat while 1,000 listen. Nothing is lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.serving_speed.crowd import Answer, Crowd, Heard, Member, allow_open_files
from kv_agent.serving.access import add_key, read_keys
from tests.engine.serving.server_process import MemoryServerProcess

pytestmark = pytest.mark.engine

WIDE = ("load-1", "load-2", "load-3")
TIGHT = "load-tight"
REQUESTS_PER_MINUTE = 10  # of TIGHT, whose clients want four times as many at once
USERS = 30  # of each wide namespace, each with a client of its own
TIGHT_USERS = 10
CHATS = 3  # of each client
LISTENERS = 1000
NAMES = ("Mara Dubois", "Hugo Thomsen", "Lena Holm", "Otto Flores", "Nina Okafor", "Uma Berg")
OPEN_FILES = 4000
LOAD_TIMEOUT_S = 300.0
SETTLE_TIMEOUT_S = 60.0
SPARE = 24  # files and threads that may have come to stay, far fewer than there were connections


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the processes of a server hold together."""

    files: int
    threads: int


@pytest.fixture
def members(memory_server: MemoryServerProcess) -> Iterator[dict[str, list[Member]]]:
    """By namespace. All have users of the same names; the limit of the tight one ends with the test."""
    keys_file = memory_server.store.parent / "keys.json"
    keys = {namespace: add_key(keys_file, namespace) for namespace in (*WIDE, TIGHT)}
    limit(keys_file, {TIGHT: REQUESTS_PER_MINUTE})
    yield {
        namespace: [
            Member(namespace=namespace, key=key, user_id=f"user-{number}")
            for number in range(TIGHT_USERS if namespace == TIGHT else USERS)
        ]
        for namespace, key in keys.items()
    }
    limit(keys_file, {})


def limit(keys_file: Path, requests_per_minute: Mapping[str, int]) -> None:
    """As an editor would: the server reads the file again because it changed."""
    changed = read_keys(keys_file).model_copy(update={"requests_per_minute": dict(requests_per_minute)})
    beside = keys_file.with_suffix(".new")
    beside.write_text(changed.model_dump_json())
    os.replace(beside, keys_file)


def held_by(session: int) -> Held:
    """Counted in ``/proc``, over all processes of a session."""
    files = threads = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                files += len(list((folder / "fd").iterdir()))
                threads += len(list((folder / "task").iterdir()))
    return Held(files=files, threads=threads)


def settled(session: int) -> Held:
    """What is held once that has not changed for two seconds."""
    held, since = held_by(session), time.monotonic()
    deadline = since + SETTLE_TIMEOUT_S
    while time.monotonic() < min(since + 2, deadline):
        time.sleep(0.2)
        if (now := held_by(session)) != held:
            held, since = now, time.monotonic()
    return held


async def talk(crowd: Crowd, member: Member, number: int) -> list[Answer]:
    """What one client does: says something, looks something up, and on."""
    chats = []
    for turn in range(CHATS):
        name = NAMES[(number + turn) % len(NAMES)]
        chats.append(await crowd.chat(member, f"{name} has badge {number} in round {turn}."))
        found = await crowd.query(member, f"Which badge does {name} have?")
        assert found.status in (200, 429), found.body
        for memory in found.body.get("memories", ()):
            assert (memory["namespace"], memory["user_id"]) == (member.namespace, member.user_id)
    return chats


async def heard_all(heard: Sequence[Heard], stored: Mapping[str, set[str]]) -> None:
    """Wait until nobody misses anything that is not said to be lost."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while any(missing(one, stored) and not one.lost for one in heard):
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(0.2)


def missing(heard: Heard, stored: Mapping[str, set[str]]) -> set[str]:
    return stored[heard.namespace] - heard.memories.get("stored", Counter()).keys()


def test_a_crowd_loses_nothing_and_leaves_nothing(
    memory_server: MemoryServerProcess, members: dict[str, list[Member]]
) -> None:
    allow_open_files(OPEN_FILES)
    allow_open_files(OPEN_FILES, memory_server.process.pid)
    everybody = [member for group in members.values() for member in group]
    listeners = [members[WIDE[number % len(WIDE)]][0] for number in range(LISTENERS - 1)]
    listeners.append(members[TIGHT][0])
    asyncio.run(warm_up(memory_server.base_url, members))
    before = settled(memory_server.process.pid)

    chats, heard = asyncio.run(load(memory_server.base_url, everybody, listeners))

    assert len(everybody) == 100
    assert len(heard) == LISTENERS
    stored: dict[str, set[str]] = defaultdict(set)
    expected: dict[Member, list[str]] = {member: [] for member in everybody}
    refused = 0
    for answer in chats:
        if answer.status == 429 and answer.member.namespace == TIGHT:
            refused += 1
            assert answer.retry_after_s is not None
            assert 1 <= answer.retry_after_s <= 60 / REQUESTS_PER_MINUTE
            continue
        assert answer.status == 200, answer.body
        report = answer.report
        assert "error" not in report
        reused = sum(report[name] for name in ("exact", "adapted", "local", "computed"))
        assert reused == answer.body["usage"]["prompt_tokens"]
        expected[answer.member].append(report["turn_id"])
        stored[answer.member.namespace].add(report["turn_id"])
    assert refused > 0
    assert sum(map(len, stored.values())) + refused == len(chats) == len(everybody) * CHATS

    for one in heard:
        told = one.memories.get("stored", Counter())
        assert one.others == set()
        assert set(told.values()) <= {1}
        assert told.keys() <= stored[one.namespace]
        assert one.lost > 0 or missing(one, stored) == set()

    limit(memory_server.store.parent / "keys.json", {})
    assert asyncio.run(listed(memory_server.base_url, everybody)) == {
        member: sorted(ids) for member, ids in expected.items()
    }

    after = settled(memory_server.process.pid)
    assert after.files <= before.files + SPARE
    assert after.threads <= before.threads + SPARE
    with memory_server.client() as client:
        health = client.get("/memory/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert asyncio.run(next_chat(memory_server.base_url, everybody[0])).status == 200


async def warm_up(base_url: str, members: Mapping[str, Sequence[Member]]) -> None:
    """Let the server start all its threads, which stay."""
    async with Crowd.at(base_url) as crowd:
        wide = [member for namespace in WIDE for member in members[namespace]]
        for _ in range(2):
            answers = await asyncio.gather(*(crowd.query(member, "Who has a badge?") for member in wide))
            assert {answer.status for answer in answers} == {200}


async def load(
    base_url: str, everybody: Sequence[Member], listeners: Sequence[Member]
) -> tuple[list[Answer], list[Heard]]:
    """All chats, and what the listeners heard of them until they left."""
    async with asyncio.timeout(LOAD_TIMEOUT_S), Crowd.at(base_url) as crowd:
        async with crowd.listening(listeners) as heard:
            talks = [talk(crowd, member, number) for number, member in enumerate(everybody)]
            chats = [answer for answers in await asyncio.gather(*talks) for answer in answers]
            refused = next(answer for answer in chats if answer.status == 429)
            chats[chats.index(refused)] = await told_when(crowd, refused)
            stored: dict[str, set[str]] = defaultdict(set)
            for answer in chats:
                if answer.status == 200:
                    stored[answer.member.namespace].add(answer.report["turn_id"])
            await heard_all(heard, stored)
        return chats, heard


async def told_when(crowd: Crowd, refused: Answer) -> Answer:
    """Who comes again when told is served."""
    assert refused.retry_after_s is not None
    await asyncio.sleep(refused.retry_after_s)
    return await crowd.chat(refused.member, "I came again when I was told to.")


async def listed(base_url: str, everybody: Sequence[Member]) -> dict[Member, list[str]]:
    async with Crowd.at(base_url) as crowd:
        found = await asyncio.gather(*map(crowd.memories, everybody))
        return {member: sorted(ids) for member, ids in zip(everybody, found, strict=True)}


async def next_chat(base_url: str, member: Member) -> Answer:
    async with Crowd.at(base_url) as crowd:
        return await crowd.chat(member, "And who has a badge?")
