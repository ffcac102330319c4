"""``kv-agent keys``: who may use the memories of a server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from kv_agent.errors import ConfigError
from kv_agent.printing import table

KEYS_ENV = "KV_AGENT_MEMORY_KEYS"
_HASH_WIDTH = 12


def add_file_option(parser: argparse.ArgumentParser) -> None:
    text = f"the file of keys (default: {KEYS_ENV}); `kv-agent keys add` makes it"
    parser.add_argument(
        "--memory-keys", type=lambda text: Path(text).expanduser(), default=None, metavar="FILE", help=text
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The three things to do with keys."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    text = "make a key for a namespace and print it, once: only its hash is kept"
    add = actions.add_parser("add", help=text, description=text)
    add.add_argument("namespace", metavar="NAMESPACE")
    add.add_argument("--admin", action="store_true", help="it may act in all namespaces")
    text = "show whose keys there are"
    show = actions.add_parser("list", help=text, description=text)
    text = "take a key away; a server that runs refuses it from then on"
    remove = actions.add_parser("remove", help=text, description=text)
    remove.add_argument("sha256", metavar="HASH", help="as `keys list` shows it")
    for sub in (add, show, remove):
        add_file_option(sub)


def run(args: argparse.Namespace) -> Sequence[str]:
    """Do it -> lines to print; raises :class:`ConfigError`."""
    named = args.memory_keys or os.environ.get(KEYS_ENV)
    if not named:
        raise ConfigError(f"which file of keys? Name it with --memory-keys or {KEYS_ENV}")
    path = Path(named).expanduser()
    match args.action:
        case "add":
            return [access().add_key(path, args.namespace, is_admin=args.admin)]
        case "remove":
            gone = access().remove_key(path, args.sha256)
            return [f"removed the key {gone.sha256[:_HASH_WIDTH]} of {gone.namespace}"]
    known = access().read_keys(path)
    rates = known.requests_per_minute
    rows = [
        (key.sha256[:_HASH_WIDTH], key.namespace, "yes" if key.admin else "no", rates.get(key.namespace))
        for key in known.keys
    ]
    return table(("HASH", "NAMESPACE", "ADMIN", "REQUESTS/MIN"), *rows)


def access() -> ModuleType:
    """:mod:`kv_agent.serving.access`, which needs what a server needs."""
    try:
        from kv_agent.serving import access
    except ImportError as err:
        raise ConfigError(f"this needs kv-agent[server]: {err}") from err
    return access
