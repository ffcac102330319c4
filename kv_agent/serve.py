"""``kv-agent serve``: what vLLM's API server must be told so that it has memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kv_agent.config import PluginConfig, parse
from kv_agent.engines.vllm_local import has_gpu, transfer_config
from kv_agent.errors import ConfigError
from kv_agent.keys import KEYS_ENV, access, add_file_option
from kv_agent.printing import table

PLUGIN = "kv_agent"
PLUGINS_ENV = "VLLM_PLUGINS"
SHUTDOWN_TIMEOUT_S = 30  # without it vLLM stops its engine while that still stores the last turns

# Plugins that vLLM loads unless it is told which to load, and those that it loads only when told so.
_UNASKED_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
_ENDPOINTS_GROUP = "vllm.endpoint_plugins"
_OURS = {
    "--model": "the model is what comes first: kv-agent serve MODEL [options]",
    "--kv-transfer-config": "--kv-transfer-config is filled in here; kv_agent's settings go into "
    "--kv-agent-config, and with another connector there is no memory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How vLLM is started: its arguments, what is added to the environment, and lines that say so."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    lines: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that are not vLLM's."""
    add_file_option(parser)
    text = "a setting of kv_agent as KEY=VALUE, or several as a JSON object; may be repeated"
    parser.add_argument(
        "--kv-agent-config", dest="settings", action="append", metavar="SETTINGS", default=[], help=text
    )


def start(model: str, options: argparse.Namespace, rest: Sequence[str], environ: Mapping[str, str]) -> Start:
    """What to start for these options and, unchanged, the ``rest``, which are vLLM's.

    ``options.folder`` is the store's. Raises :class:`ConfigError` for what contradicts itself.
    """
    given = set(map(_name, rest))
    for name in given & _OURS.keys():
        raise ConfigError(_OURS[name])
    settings = _settings_of(options)
    added = []
    if "--shutdown-timeout" not in given:
        added += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
    if not given & {"--enforce-eager", "--no-enforce-eager"} and not has_gpu():
        added.append("--enforce-eager")
    plugins = plugins_with_ours(environ.get(PLUGINS_ENV))
    environment = {PLUGINS_ENV: ",".join(plugins)}
    keys = options.memory_keys or (Path(environ[KEYS_ENV]).expanduser() if environ.get(KEYS_ENV) else None)
    if keys is not None:
        environment[KEYS_ENV] = str(keys.absolute())
    has_server_key = "--api-key" in given or bool(environ.get("VLLM_API_KEY"))
    rows = [
        ("model", model),
        ("store", settings["store"]),
        *(("setting", f"{name} = {value}") for name, value in settings.items() if name != "store"),
        ("routes", "/memory/*, and the field `memory` of /v1/chat/completions, completions and responses"),
        ("keys", _who_may(keys, has_server_key)),
        ("plugins", ", ".join(plugins)),
        *([("added", " ".join(added))] if added else []),
    ]
    transfer = json.dumps(transfer_config(settings))
    arguments = ("--model", model, "--kv-transfer-config", transfer, *added, *rest)
    return Start(arguments=arguments, environment=environment, lines=tuple(table(*rows)))


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` and JSON objects as one; a value is JSON where it can be, else text."""
    settings: dict[str, Any] = {}
    for text in given:
        for name, value in _read(text).items():
            if name in settings:
                raise ConfigError(f"--kv-agent-config: {name} is given twice")
            settings[name] = value
    return settings


def plugins_with_ours(chosen: str | None) -> list[str]:
    """What ``VLLM_PLUGINS`` must name.

    Where it is not set vLLM loads everything that is installed, but for plugins with routes; naming ours
    alone would switch the others off. One that has routes, too, stays off: nobody asked for them.
    """
    if chosen is not None:
        names = [name for name in chosen.split(",") if name]
    else:
        with_routes = {plugin.name for plugin in entry_points(group=_ENDPOINTS_GROUP)}
        unasked = {plugin.name for group in _UNASKED_GROUPS for plugin in entry_points(group=group)}
        names = sorted(unasked - with_routes)
    return list(dict.fromkeys([*names, PLUGIN]))


def _settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Checked now, not in the log of an engine that does not start; with the store named in full."""
    settings = read_settings(options.settings)
    named = parse(PluginConfig, settings, "--kv-agent-config").store.expanduser()
    store = named if "store" in settings else options.folder
    if options.store not in (None, store):
        raise ConfigError(f"--store is {options.store}, --kv-agent-config says {named}; name one")
    return settings | {"store": str(store.absolute())}


def _read(text: str) -> Mapping[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            read: Mapping[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise ConfigError(f"--kv-agent-config: this is no JSON object: {err}") from err
        return read
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(f"--kv-agent-config: {text!r} is neither KEY=VALUE nor a JSON object")
    try:
        return {name: json.loads(value)}
    except (ValueError, RecursionError):
        return {name: value}


def _name(argument: str) -> str:
    """The option that an argument is, as vLLM reads it: ``--a_b.c=d`` is ``--a-b``."""
    return argument.partition("=")[0].partition(".")[0].replace("_", "-")


def _who_may(keys: Path | None, has_server_key: bool) -> str:
    if keys is not None:
        known = access().read_keys(keys).keys
        return f"{len(known)} of {len({key.namespace for key in known})} namespaces, in {keys}"
    if has_server_key:
        return "vLLM's own API key opens the one namespace, `default`"
    return "none: one namespace, `default`, for whoever reaches this server; see `kv-agent keys`"
