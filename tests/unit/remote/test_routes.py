"""Both clients against the memory routes over HTTP, beside a memory of this process on the same store."""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from kv_agent import AgentMemory, AsyncAgentMemory, CacheManager, ConfigError, Memory, Retention, TurnFilter
from kv_agent.chunks import TurnId
from kv_agent.memories import Stats
from kv_agent.remote.memory import RemoteMemory
from kv_agent.remote.operations import cursor_before
from kv_agent.serving.schemas import cursor_after
from kv_agent.storage.store import LocalStore
from tests.unit.remote.conftest import LiveServer
from tests.unit.stand_in import StandIn

Connect = Callable[..., Any]

FACTS = [
    ("Mara Dubois lives in Oslo.", "planner", "monday", {"topic": "people", "page": 3}),
    ("Oslo has a harbour.", "planner", "tuesday", {"topic": "places"}),
    ("Ben Okafor is a baker in Rome.", "researcher", "monday", {"topic": "people", "sure": 0.5}),
    ("The harbour opens at six — früh.", "researcher", None, {}),
]


@pytest.fixture(scope="module")
def manager(live: LiveServer) -> Iterator[CacheManager]:
    """In this process, on the server's store."""
    engine = StandIn(LocalStore(live.store, host_bytes=0))
    with CacheManager(engine, store=live.store) as manager:
        yield manager


@pytest.fixture
def namespace() -> str:
    return f"acme-{uuid.uuid4().hex}"


@pytest.fixture
def own(manager: CacheManager, namespace: str) -> Connect:
    """Makes memories of this process."""
    return partial(AgentMemory, manager, namespace=namespace, user_id="u")


@pytest.fixture
def remote(live: LiveServer, connect: Connect, namespace: str) -> Connect:
    """Makes clients of the server."""
    return partial(connect, base_url=live.url, api_key=live.key(namespace), user_id="u")


@pytest.fixture
def stranger(live: LiveServer, connect: Connect, namespace: str) -> Connect:
    """With a key of another namespace."""
    key = live.key(f"not-{namespace}")
    return partial(connect, base_url=live.url, api_key=key, user_id="u")


@pytest.fixture
def stored(remote: Connect) -> list[TurnId]:
    ids = []
    for prompt, agent_id, session_id, metadata in FACTS:
        memory = remote(agent_id=agent_id, session_id=session_id)
        ids.append(memory.store(prompt, "I will remember that.", metadata=metadata))
    return ids


SCOPES = [
    {},
    {"agent_id": "planner", "share": "agent"},
    {"agent_id": "planner", "session_id": "monday", "share": "session"},
    {"agent_id": "planner"},
]


@pytest.mark.parametrize("options", SCOPES)
@pytest.mark.usefixtures("stored")
def test_what_is_found_is_what_a_memory_of_this_process_finds(
    remote: Connect, own: Connect, options: dict[str, str]
) -> None:
    theirs, ours = remote(**options), own(**options)

    for query, ways in [
        ("Who lives in Oslo?", {"explain": True}),
        ("harbour", {"top_k": 1, "neighbours": 1}),
        ("früh", {"only": TurnFilter(metadata={"topic": "places"})}),
        ("people in Rome", {"only": TurnFilter(metadata={"sure": 0.5})}),
        ("", {}),
    ]:
        found = theirs.retrieve(query, mode="lexical", **ways)
        assert found == ours.retrieve(query, mode="lexical", **ways)
        assert all(isinstance(memory, Memory) for memory in found)
    assert ours.retrieve("Mara Dubois", mode="lexical")


@pytest.mark.parametrize("options", SCOPES)
def test_lists_and_looks_up_as_a_memory_of_this_process(
    remote: Connect, own: Connect, stored: list[TurnId], options: dict[str, str]
) -> None:
    theirs, ours = remote(**options), own(**options)

    assert theirs.list() == ours.list()
    assert [theirs.get(id) for id in stored] == [ours.get(id) for id in stored]
    first = ours.list(1)[0]
    assert theirs.list(2, first.created, first.id) == ours.list(2, first.created, first.id)
    assert theirs.list(2, before=first.created) == ours.list(2, before=first.created)


@pytest.mark.usefixtures("stored")
def test_a_list_longer_than_a_page_is_read_page_by_page(
    remote: Connect, own: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_agent.remote.operations.MAX_PAGE", 2)
    theirs, ours = remote(), own()

    assert [len(theirs.list(limit)) for limit in (1, 2, 3, 4, 9)] == [1, 2, 3, 4, 4]
    assert theirs.list(3) == ours.list(3)


def test_a_cursor_is_as_the_server_makes_it(own: Connect, stored: list[TurnId]) -> None:
    (memory,) = own().list(1)

    assert memory.id in stored
    assert cursor_before(memory.created, memory.id) == cursor_after([memory])


def test_forgets_and_pins_only_what_it_reads(
    remote: Connect, stranger: Connect, own: Connect, stored: list[TurnId]
) -> None:
    mara, oslo, ben, harbour = stored
    planner, anyone, other = remote(agent_id="planner", share="agent"), remote(), stranger()

    assert (planner.pin(mara), planner.pin(ben), other.pin(mara)) == (True, False, False)
    assert anyone.pin(harbour)
    assert {memory.id for memory in own().list() if memory.pinned} == {mara, harbour}
    assert (planner.unpin(mara), planner.unpin(harbour)) == (True, False)
    assert {memory.id for memory in own().list() if memory.pinned} == {harbour}
    assert other.forget(stored) == 0
    assert planner.forget([mara, mara, ben, TurnId("unknown")]) == 1
    assert anyone.forget([oslo, mara]) == 1
    assert {memory.id for memory in own().list()} == {ben, harbour}


@pytest.mark.parametrize("id", ["", "stats", "health", "a/pin", "..", "%2e%2e", "a?x=y", "ü" * 9, "x" * 300])
def test_what_is_no_id_names_no_memory(remote: Connect, stored: list[TurnId], id: str) -> None:
    memory = remote()

    assert memory.get(TurnId(id)) is None
    assert not memory.pin(TurnId(id))
    assert memory.forget([TurnId(id), *stored]) == len(stored)


@pytest.mark.usefixtures("stored")
def test_stats_are_those_of_the_keys_namespace(
    remote: Connect, stranger: Connect, own: Connect, manager: CacheManager, namespace: str
) -> None:
    manager.store.set_retention(namespace, Retention(max_memories=50, ttl_s=9e9))

    stats = remote().stats()

    assert stats == own().stats()
    assert (stats.namespace, stats.memories, stats.limits.max_memories) == (namespace, len(FACTS), 50)
    assert stranger().stats() == Stats(
        namespace=f"not-{namespace}",
        memories=0,
        tokens=0,
        num_bytes=0,
        evicted=0,
        refused=0,
        limits=Retention(),
    )


def test_an_admin_may_name_a_namespace_and_others_may_not(
    live: LiveServer, connect: Connect, stranger: Connect, stored: list[TurnId], namespace: str
) -> None:
    key = live.key("operations", is_admin=True)
    admin = connect(base_url=live.url, api_key=key, user_id="u", namespace=namespace)

    assert {memory.id for memory in admin.list()} == set(stored)
    with pytest.raises(ConfigError, match="only an admin key may name a namespace"):
        stranger(namespace=namespace).list()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda memory: memory.retrieve("x", top_k=1000), "top_k: .*less than or equal to 100"),
        (lambda memory: memory.retrieve("x", mode="psychic"), "mode: "),
        (lambda memory: memory.store(""), "prompt: "),
        (lambda memory: memory.store("x", ttl_s=-1), "ttl_s: "),
        (lambda memory: memory.store("x", metadata={"a": [1]}), "metadata"),
        (lambda memory: memory.store("x", metadata={"a": object()}), "cannot be sent"),
        (lambda memory: memory.store("x", ttl_s=float("nan")), "cannot be sent"),
        (lambda memory: memory.store("\ud800"), "cannot be sent"),
        (lambda memory: memory.list(0), "limit: "),
        (lambda memory: memory.list(before_id="x", before=float("nan")), "no cursor"),
        (lambda memory: memory.store("x" * (2 << 20)), "bytes at most"),
        (lambda memory: memory.generate("x"), "no memory on this server"),  # there is no chat here
    ],
)
def test_a_refusal_is_a_config_error_with_what_the_server_says(
    remote: Connect, call: Any, sentence: str
) -> None:
    memory = remote()

    with pytest.raises(ConfigError, match=sentence):
        call(memory)
    assert memory.list() == []  # the next request works


@pytest.mark.parametrize("key", [None, "kva-wrong"])
def test_without_a_good_key_it_says_how_to_get_one(
    live: LiveServer, connect: Connect, key: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"does not accept this API key.*kv-agent keys add"):
        connect(base_url=live.url, api_key=key).list()


def test_a_user_that_cannot_be_sent_is_refused(remote: Connect) -> None:
    memory = remote(user_id="\ud800")
    for call in (memory.list, lambda: memory.store("x"), lambda: memory.get("a"), lambda: memory.pin("a")):
        with pytest.raises(ConfigError, match="cannot be sent"):
            call()


def test_the_urls_of_openai_clients_are_understood(live: LiveServer, remote: Connect) -> None:
    for url in (live.url + "/", live.url + "/v1", live.url + "/v1/"):
        assert remote(base_url=url).list() == []


def test_both_clients_have_the_methods_of_a_memory_in_this_process() -> None:
    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(member).parameters.values())
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") and name != "prepare"
        }

    expected = methods(AgentMemory)
    assert methods(RemoteMemory) == expected
    assert methods(AsyncAgentMemory) == expected
    # Whatever touches an engine or a store of this process is replaced.
    inherited = {name for name in expected if getattr(RemoteMemory, name) is getattr(AgentMemory, name)}
    assert inherited == {"retrieve"}


def test_a_base_url_makes_a_remote_memory(live: LiveServer) -> None:
    with AgentMemory(base_url=live.url, api_key=live.key("new"), user_id="u") as memory:
        assert type(memory) is RemoteMemory
        assert memory.scope.user_id == "u"
        assert memory.list() == []
    with pytest.raises(RuntimeError, match="closed"):
        memory.list()


def test_a_rate_of_the_server_is_kept_to(live: LiveServer) -> None:
    key, namespace = live.key("slow"), "slow"
    file = json.loads(live.keys_file.read_text())
    file["requests_per_minute"] = {namespace: 30}
    changed = live.keys_file.with_suffix(".new")
    changed.write_text(json.dumps(file))
    changed.replace(live.keys_file)
    statuses: list[int] = []
    hooks = {"response": [lambda response: statuses.append(response.status_code)]}

    with (
        httpx.Client(event_hooks=hooks) as client,
        AgentMemory(base_url=live.url, api_key=key, http_client=client) as memory,
    ):
        while 429 not in statuses and len(statuses) < 1000:
            assert memory.stats().namespace == namespace
        assert statuses[-2:] == [429, 200]
    assert client.is_closed
