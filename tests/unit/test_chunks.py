"""Scopes and keys. The literal keys are on users' disks: when one changes, every stored memory is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_agent.chunks import (
    ChunkKey,
    Fingerprint,
    Scope,
    adapted_key,
    chain_key,
    content_key,
    root_key,
    token_bytes,
    tokens_from_bytes,
)
from kv_agent.errors import ConfigError

FP = Fingerprint("fp")
ROOT_KEY = ChunkKey("e59f6ccdf1956bda7fd97148a6b84a60")
CHAIN_KEY = ChunkKey("0b6898e062120ef501618fba36cd367b")
token_ids = st.lists(st.integers(min_value=0, max_value=2**31 - 1), max_size=40)


def test_keys_keep_their_values() -> None:
    assert root_key(FP, "default", "default") == ROOT_KEY
    assert chain_key(ROOT_KEY, [1, 2, 3]) == CHAIN_KEY
    assert content_key(FP, [1, 2, 3]) == "9fabc96831fc70de664e113f8ff5df81"
    assert adapted_key(ROOT_KEY, CHAIN_KEY) == "d2ea0121d6ca475936dd980984065639"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c", "d"), ("a", "bc", "d")),
        (("a", "bc", "d"), ("a", "b", "cd")),
        (("a", "b", "c"), ("a", "c", "b")),
        (("é", "b", "c"), ("e", "b", "c")),
    ],
)
def test_root_key_separates_its_parts(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    keys = [root_key(Fingerprint(fp), namespace, user) for fp, namespace, user in (one, other)]
    assert keys[0] != keys[1]


def test_chain_key_separates_parent_from_tokens() -> None:
    # The last four characters of one parent are the bytes of the other's first token.
    token = int.from_bytes(b"wxyz", "little")
    assert chain_key(ChunkKey("stuvwxyz"), [7]) != chain_key(ChunkKey("stuv"), [token, 7])


def test_chain_key_depends_on_where_chunks_are_cut() -> None:
    in_two = chain_key(chain_key(ROOT_KEY, [1]), [2])
    assert in_two != chain_key(ROOT_KEY, [1, 2])


def test_same_parts_give_different_keys_per_kind() -> None:
    assert chain_key(ChunkKey("fp"), [1]) != content_key(FP, [1])
    assert chain_key(ChunkKey("fp"), []) != adapted_key(ChunkKey("fp"), ChunkKey(""))


def test_what_follows_moved_chunk_never_gets_exact_key() -> None:
    moved = chain_key(root_key(FP, "default", "someone"), [1, 2])
    exact = chain_key(chain_key(ROOT_KEY, [1, 2]), [3])
    assert chain_key(adapted_key(ROOT_KEY, moved), [3]) != exact


@given(one=token_ids, other=token_ids)
def test_content_keys_are_equal_exactly_for_equal_tokens(one: list[int], other: list[int]) -> None:
    assert (content_key(FP, one) == content_key(FP, other)) == (one == other)


@given(ids=token_ids)
def test_token_bytes_round_trip(ids: list[int]) -> None:
    assert tokens_from_bytes(token_bytes(ids)) == tuple(ids)


def test_token_bytes_are_little_endian_32_bit() -> None:
    assert token_bytes((1, 258)) == b"\x01\0\0\0\x02\x01\0\0"


@pytest.mark.parametrize(
    ("asking", "stored", "admitted"),
    [
        ({}, {}, True),
        ({}, {"agent_id": "a", "session_id": "s"}, True),
        ({"agent_id": "a"}, {"agent_id": "a", "session_id": "s"}, True),
        ({"agent_id": "a"}, {"agent_id": "b"}, False),
        ({"agent_id": "a"}, {}, False),
        ({"session_id": "s"}, {"agent_id": "a", "session_id": "s"}, True),
        ({"session_id": "s"}, {"session_id": "t"}, False),
        ({"agent_id": "a", "session_id": "s"}, {"agent_id": "a", "session_id": "s"}, True),
        ({"agent_id": "a", "session_id": "s"}, {"agent_id": "b", "session_id": "s"}, False),
        ({"user_id": "u"}, {"user_id": "v"}, False),
        ({"user_id": "u"}, {"user_id": "u", "agent_id": "a"}, True),
        ({"namespace": "n"}, {}, False),
        ({"namespace": "n"}, {"namespace": "n", "session_id": "s"}, True),
    ],
)
def test_scope_admits(asking: dict[str, str], stored: dict[str, str], admitted: bool) -> None:
    assert Scope(**asking).admits(Scope(**stored)) is admitted


def test_scope_never_admits_other_namespace_or_user() -> None:
    names = ("default", "x")
    owners = list(itertools.product(names, names))
    for (namespace, user), (other_namespace, other_user) in itertools.product(owners, owners):
        asking = Scope(namespace=namespace, user_id=user)
        stored = Scope(namespace=other_namespace, user_id=other_user)
        assert asking.admits(stored) is ((namespace, user) == (other_namespace, other_user))


@pytest.mark.parametrize("field", ["namespace", "user_id", "agent_id", "session_id"])
def test_scope_refuses_empty_name(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Scope(**{field: ""})
