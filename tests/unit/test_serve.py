"""What ``kv-agent serve`` starts, and ``kv-agent keys`` as a shell sees it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from kv_agent import cli, serve
from kv_agent.engines.vllm_local import transfer_config
from kv_agent.errors import ConfigError
from kv_agent.keys import KEYS_ENV
from kv_agent.serve import PLUGINS_ENV, Start, plugins_with_ours, read_settings
from kv_agent.serving.access import Access, add_key
from tests.unit.command import error_of, lines_of

STORE = Path("/data/memories")


def started(*rest: str, environ: Mapping[str, str] | None = None, **options: Any) -> Start:
    given = {"memory_keys": None, "settings": [], "store": None, "folder": STORE, **options}
    return serve.start("org/model", argparse.Namespace(**given), rest, environ or {})


def transfer_of(start: Start) -> Any:
    arguments = list(start.arguments)
    return json.loads(arguments[arguments.index("--kv-transfer-config") + 1])


def test_vllm_gets_the_model_our_connector_and_all_other_options_as_they_are() -> None:
    rest = ["--max-model-len", "512", "-tp", "2", "--hf_overrides", '{"a": -1}', "--api-key", "x", "--x=--y"]

    start = started(*rest)

    assert start.arguments[:2] == ("--model", "org/model")
    assert transfer_of(start) == transfer_config({"store": str(STORE)})
    assert start.arguments[4:] == ("--shutdown-timeout", "30", "--enforce-eager", *rest)
    assert start.environment == {PLUGINS_ENV: ",".join(plugins_with_ours(None))}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever these tests run."""
    monkeypatch.setattr(serve, "has_gpu", lambda: False)


@pytest.mark.parametrize(
    "option",
    [
        ["--shutdown-timeout", "5", "--enforce-eager"],
        ["--shutdown_timeout=5", "--enforce_eager"],
        ["--no-enforce-eager", "--shutdown-timeout=0"],
    ],
)
def test_what_is_added_gives_way_to_ones_own(option: list[str]) -> None:
    start = started(*option)
    assert start.arguments[4:] == tuple(option)
    assert not [line for line in start.lines if line.startswith("added")]


def test_a_gpu_compiles_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "has_gpu", lambda: True)
    assert started().arguments[4:] == ("--shutdown-timeout", "30")
    assert started().lines[-1] == "added    --shutdown-timeout 30"


def test_settings_are_merged_from_all_options() -> None:
    given = [
        "chunk_tokens=32",
        '{"codec": "int8", "pooled_layers": [0, 1]}',
        "policy=fifo",
        "make_room=false",
    ]

    settings = transfer_of(started(settings=given))["kv_connector_extra_config"]["kv_agent"]

    assert settings == {
        "chunk_tokens": 32,
        "codec": "int8",
        "pooled_layers": [0, 1],
        "policy": "fifo",
        "make_room": False,
        "store": str(STORE),
    }


def test_the_store_may_be_named_among_the_settings(tmp_path: Path) -> None:
    named = [f"store={tmp_path}"]

    for start in (started(settings=named), started(settings=named, store=tmp_path, folder=tmp_path)):
        assert transfer_of(start)["kv_connector_extra_config"]["kv_agent"]["store"] == str(tmp_path)
    with pytest.raises(ConfigError, match=r"--store is .*; name one"):
        started(settings=named, store=STORE)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["chunk_tokens"], "neither KEY=VALUE nor a JSON object"),
        (["=1"], "neither KEY=VALUE nor a JSON object"),
        (["{"], "no JSON object"),
        (["a=1", '{"a": 2}'], "a is given twice"),
        (["chunks=1"], "--kv-agent-config: chunks: .*known keys: store"),
        (["store=1"], "--kv-agent-config: store: "),
        (["chunk_tokens=many"], "--kv-agent-config: chunk_tokens: "),
    ],
)
def test_settings_that_are_none_are_refused_before_vllm_starts(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        started(settings=settings)


def test_a_value_is_json_where_it_can_be() -> None:
    given = ["a=1", "b=x=y", 'c="1"', "d=null", "e=", "f=[1]"]
    assert read_settings(given) == {"a": 1, "b": "x=y", "c": "1", "d": None, "e": "", "f": [1]}


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--kv-transfer-config", "filled in here"),
        ("--kv_transfer_config={}", "filled in here"),
        ("--kv-transfer-config.kv_role=kv_both", "filled in here"),
        ("--model=other", "what comes first"),
    ],
)
def test_what_is_filled_in_cannot_be_given(option: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        started("--max-model-len", "512", option)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [("mine,kv_agent", ["mine", "kv_agent"]), ("mine", ["mine", "kv_agent"]), ("", ["kv_agent"])],
)
def test_plugins_that_the_user_chose_stay(chosen: str, names: list[str]) -> None:
    assert started(environ={PLUGINS_ENV: chosen}).environment[PLUGINS_ENV] == ",".join(names)


def test_plugins_that_vllm_loads_unasked_stay_but_none_with_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "vllm.general_plugins": ["kv_agent", "resolver", "routes_too"],
        "vllm.platform_plugins": ["chip"],
        "vllm.endpoint_plugins": ["kv_agent", "routes_too", "routes_only"],
    }

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, "some:thing", group) for name in installed.get(group, [])]

    monkeypatch.setattr(serve, "entry_points", entry_points)

    assert plugins_with_ours(None) == ["chip", "resolver", "kv_agent"]


def test_the_lines_say_who_may(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    for namespace in ("acme", "acme", "zoo"):
        add_key(keys, namespace)

    def who(start: Start) -> str:
        return next(line for line in start.lines if line.startswith("keys"))

    assert "none: one namespace" in who(started())
    assert "vLLM's own API key" in who(started("--api-key=x"))
    assert "vLLM's own API key" in who(started(environ={"VLLM_API_KEY": "x"}))
    for start in (started(memory_keys=keys), started(environ={KEYS_ENV: str(keys)})):
        assert f"3 of 2 namespaces, in {keys}" in who(start)
        assert start.environment[KEYS_ENV] == str(keys)
    with pytest.raises(ConfigError, match="cannot read the memory keys"):
        started(memory_keys=tmp_path / "other.json")


Run = Callable[..., list[tuple[str, ...]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command up to where vLLM begins -> what vLLM would be started with."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "run_api_server", seen.append)
    for name in (PLUGINS_ENV, KEYS_ENV):
        monkeypatch.setenv(name, "")

    def command(*argv: object) -> list[tuple[str, ...]]:
        assert cli.main(["serve", *map(str, argv)]) == 0
        return seen

    return command


def test_our_options_may_stand_before_the_model_and_between_vllms(run: Run, tmp_path: Path) -> None:
    before = run("--store", tmp_path, "m", "--port", "1", "--max-num-seqs", "-1")
    between = run("m", "--port", "1", "--store", tmp_path, "--max-num-seqs", "-1")

    assert before[0] == between[1]
    assert before[0][-4:] == ("--port", "1", "--max-num-seqs", "-1")
    assert str(tmp_path) in before[0][3]


def test_help_behind_the_model_is_vllms(run: Run) -> None:
    assert run("m", "--help=all")[0][-1] == "--help=all"
    assert run("m", "--mem", "x")[1][-2:] == ("--mem", "x")  # no abbreviation of ours


def test_a_model_must_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--max-model-len", "512", "m"])
    assert "--max-model-len" in capsys.readouterr().err


def test_trouble_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "filled in here" in error_of(capsys, "serve", "m", "--kv-transfer-config", "{}")


def test_keys_are_made_shown_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    option = ["--memory-keys", file]

    (mine,) = lines_of(capsys, "keys", "add", "acme", *option)
    (boss,) = lines_of(capsys, "keys", "add", "ops", "--admin", *option)
    head, first, second = lines_of(capsys, "keys", "list", *option)

    callers = [Access(file).caller(key) for key in (mine, boss)]
    assert [(one.namespace, one.is_admin) for one in callers] == [("acme", False), ("ops", True)]
    assert head.split() == ["HASH", "NAMESPACE", "ADMIN", "REQUESTS/MIN"]
    assert (first.split()[1:], second.split()[1:]) == (["acme", "no", "-"], ["ops", "yes", "-"])
    assert mine not in file.read_text()
    (line,) = lines_of(capsys, "keys", "remove", first.split()[0], *option)
    assert line == f"removed the key {first.split()[0]} of acme"
    assert len(lines_of(capsys, "keys", "list", *option)) == 2
    assert "0 keys have a hash" in error_of(capsys, "keys", "remove", first.split()[0], *option)
    assert "no namespace can have this name" in error_of(capsys, "keys", "add", "", *option)


def test_the_file_of_keys_may_be_named_by_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS_ENV, str(tmp_path / "keys.json"))
    (key,) = lines_of(capsys, "keys", "add", "acme")
    assert Access(tmp_path / "keys.json").caller(key).namespace == "acme"
    monkeypatch.delenv(KEYS_ENV)
    assert "--memory-keys" in error_of(capsys, "keys", "list")
