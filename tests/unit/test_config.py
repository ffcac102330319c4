"""What enters from outside: defaults, refusals that name the key, and where the store lies."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from kv_agent.chunks import Scope
from kv_agent.config import PluginConfig, PolicyName, RequestOptions, ScopeOptions, default_store_dir, parse
from kv_agent.errors import ConfigError
from kv_agent.storage.policy import POLICIES

CHUNK_ID = "0123456789abcdef" * 2


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("KV_AGENT_STORE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_store_is_where_variable_says(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KV_AGENT_STORE", "/data/kv")
    environment.setenv("XDG_CACHE_HOME", "/cache")
    assert default_store_dir() == Path("/data/kv")


def test_store_variable_expands_home(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOME", "/home/ann")
    environment.setenv("KV_AGENT_STORE", "~/kv")
    assert default_store_dir() == Path("/home/ann/kv")


@pytest.mark.parametrize("empty", ["KV_AGENT_STORE", "XDG_CACHE_HOME"])
def test_empty_variable_counts_as_unset(environment: pytest.MonkeyPatch, empty: str) -> None:
    environment.setenv("HOME", "/home/ann")
    environment.setenv(empty, "")
    assert default_store_dir() == Path("/home/ann/.cache/kv_agent")


def test_store_is_in_cache_folder(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOME", "/home/ann")
    environment.setenv("XDG_CACHE_HOME", "/cache")
    assert default_store_dir() == Path("/cache/kv_agent")


def test_store_without_home_variable_is_in_account_home(environment: pytest.MonkeyPatch) -> None:
    account = pwd.struct_passwd(("ann", "x", 1, 1, "", "/home/ann", "/bin/sh"))
    environment.setattr(pwd, "getpwuid", lambda _uid: account)
    assert default_store_dir() == Path("/home/ann/.cache/kv_agent")


def test_store_without_any_home_is_in_temporary_folder(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_account(_uid: int) -> pwd.struct_passwd:
        raise KeyError("uid not found")

    environment.setattr(pwd, "getpwuid", no_account)
    environment.setattr("tempfile.tempdir", str(tmp_path))
    assert default_store_dir() == tmp_path / "kv_agent"


def test_plugin_config_follows_store_variable(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KV_AGENT_STORE", "/data/kv")
    assert parse(PluginConfig, None, "config").store == Path("/data/kv")


@pytest.mark.parametrize("raw", [None, {}])
def test_nothing_given_means_defaults(raw: dict[str, Any] | None) -> None:
    assert parse(PluginConfig, raw, "config") == PluginConfig()
    assert parse(RequestOptions, raw, "request") == RequestOptions()


@pytest.mark.parametrize(
    ("model", "raw", "key"),
    [
        (PluginConfig, {"chunk_token": 1}, "chunk_token"),
        (PluginConfig, {"Store": "x"}, "Store"),
        (RequestOptions, {"plans": {}}, "plans"),
        (RequestOptions, {"scope": {"user": "ann"}}, "scope.user"),
        (RequestOptions, {"plan": {"placements": [], "fresh_start": 0, "x": 1}}, "plan.x"),
        (RequestOptions, {"probe": {"stop": 3}}, "probe.stop"),
    ],
)
def test_unknown_key_is_refused_by_name(model: type[BaseModel], raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(model, raw, "the request")
    message = str(caught.value)
    assert message.startswith("the request: ")
    assert f"{key}: " in message


@pytest.mark.parametrize(
    ("model", "raw", "key"),
    [
        (PluginConfig, {"chunk_tokens": 0}, "chunk_tokens"),
        (PluginConfig, {"chunk_tokens": "many"}, "chunk_tokens"),
        (PluginConfig, {"host_bytes": -1}, "host_bytes"),
        (PluginConfig, {"warm_bytes": -1}, "warm_bytes"),
        (PluginConfig, {"promote_after": 0}, "promote_after"),
        (PluginConfig, {"queue_bytes": 0}, "queue_bytes"),
        (PluginConfig, {"pooled_layers": []}, "pooled_layers"),
        (PluginConfig, {"load_threads": 0}, "load_threads"),
        (PluginConfig, {"policy": "arc"}, "policy"),
        (PluginConfig, {"fsync": True}, "fsync"),
        (PluginConfig, {"disk_bytes": 0}, "disk_bytes"),
        (RequestOptions, {"content_start": -1}, "content_start"),
        (RequestOptions, {"metadata": {"nested": {}}}, "metadata.nested"),
        (RequestOptions, {"scope": {"namespace": ""}}, "scope.namespace"),
        (RequestOptions, {"scope": {"user_id": "u" * 257}}, "scope.user_id"),
        (RequestOptions, {"probe": {"end": 0}}, "probe.end"),
        (RequestOptions, {"plan": {"fresh_start": 0}}, "plan.placements"),
        (
            RequestOptions,
            {"plan": {"placements": [{"chunk_id": "../x", "start": 0}], "fresh_start": 0}},
            "plan.placements.0.chunk_id",
        ),
        (
            RequestOptions,
            {"plan": {"placements": [{"chunk_id": CHUNK_ID, "start": -1}], "fresh_start": 0}},
            "plan.placements.0.start",
        ),
    ],
)
def test_bad_value_is_refused_by_name(model: type[BaseModel], raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(model, raw, "the request")
    assert f"{key}" in str(caught.value)


def test_full_request_is_understood() -> None:
    raw = {
        "scope": {"namespace": "team", "user_id": "ann", "agent_id": "coder"},
        "store": False,
        "content_start": 12,
        "metadata": {"topic": "billing", "turn": 3, "score": 0.5, "pinned": True},
        "plan": {"placements": [{"chunk_id": CHUNK_ID, "start": 12, "skip": 3}], "fresh_start": 40},
        "part_of": [CHUNK_ID],
        "ttl_s": 60.0,
        "probe": {"start": 12, "end": 20},
    }
    options = parse(RequestOptions, raw, "request")
    assert options.model_dump(mode="json", exclude_none=True) == raw


def test_metadata_values_keep_their_types() -> None:
    options = parse(RequestOptions, {"metadata": {"a": True, "b": 1, "c": "1"}}, "request")
    assert [type(value) for value in options.metadata.values()] == [bool, int, str]


def test_scope_options_become_scope() -> None:
    options = ScopeOptions(namespace="team", user_id="ann", session_id="s")
    assert options.to_scope() == Scope(namespace="team", user_id="ann", session_id="s")


def test_options_cannot_be_changed() -> None:
    options = PluginConfig()
    with pytest.raises(ValidationError, match="frozen"):
        options.chunk_tokens = 1  # type: ignore[misc]


def test_a_policy_can_be_chosen_by_every_name_there_is() -> None:
    assert set(get_args(PolicyName)) == POLICIES.keys()
