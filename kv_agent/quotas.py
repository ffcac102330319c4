"""The limits of namespaces as ``kv-agent quota`` takes and shows them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kv_agent.printing import size, span, table
from kv_agent.storage.ledger import NO_ACCOUNT, Account, Ledger
from kv_agent.storage.policy import POLICIES
from kv_agent.storage.retention import Retention

OTHERS = "(all others)"  # not a namespace: the limits of those that have none of their own
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)?")
_SPAN_S = {None: 1, "s": 1, "min": 60, "h": 3_600, "d": 86_400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The limits that apply to a namespace and what it holds; all others have no name and hold nothing."""

    namespace: str | None
    limits: Retention
    account: Account = NO_ACCOUNT

    def plain(self) -> dict[str, Any]:
        """For JSON; without an account where there is none."""
        account = {} if self.namespace is None else asdict(self.account)
        return {"namespace": self.namespace, **asdict(self.limits), **account.pop("held", {}), **account}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a limit is set with; an option that is not given leaves no attribute."""
    policies = f"who goes first: {', '.join(POLICIES)}, or `none`: the engine's settings say"
    window = "keep of each agent's session the newest memories with that many tokens"
    for option, field, parse, metavar, text in (
        ("--policy", "policy", _name, "NAME", policies),
        ("--max-bytes", "max_bytes", parse_size, "SIZE", "bytes of its chunks, such as 500M or 10G"),
        ("--max-tokens", "max_tokens", _count, "N", "tokens of its chunks"),
        ("--max-memories", "max_memories", _count, "N", "number of its memories"),
        ("--window-tokens", "window_tokens", _count, "N", window),
        ("--ttl", "ttl_s", parse_span, "TIME", "forget what is stored from now on after 12h or 30d, say"),
    ):
        parser.add_argument(
            option, dest=field, type=parse, metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    text = "take its own limits away, so that those of all others apply"
    parser.add_argument("--clear", action="store_true", help=text)


def change(ledger: Ledger, namespace: str | None, options: Mapping[str, Any]) -> None:
    """Set what the options name; the rest stays as it applies now. Without any option nothing changes."""
    if options["clear"]:
        ledger.set_retention(namespace, None)
    names = [field.name for field in fields(Retention)]
    if given := {name: options[name] for name in names if name in options}:
        ledger.set_retention(namespace, replace(ledger.retention(namespace or ""), **given))


def quotas(ledger: Ledger, namespace: str | None) -> list[Quota]:
    """That of one namespace, or of all that hold something or have limits, and of all others."""
    own, accounts = ledger.retentions(), ledger.accounts()
    others = own.pop(None, Retention())
    names = {name for name, account in accounts.items() if account != NO_ACCOUNT} | set(filter(None, own))
    found = [
        Quota(namespace=name, limits=own.get(name, others), account=accounts.get(name, NO_ACCOUNT))
        for name in (sorted(names) if namespace is None else [namespace])
    ]
    return found if namespace is not None else [*found, Quota(namespace=None, limits=others)]


def lines(rows: Sequence[Quota]) -> list[str]:
    """A table; ``of`` stands before a limit."""
    head = ("NAMESPACE", "SIZE", "TOKENS", "MEMORIES", "POLICY", "WINDOW", "TTL", "EVICTED", "REFUSED")
    return table(head, *map(_cells, rows))


def parse_size(text: str) -> int | None:
    """``10G`` -> bytes, ``none`` -> ``None``; units are powers of 1024, as sizes are shown."""
    if (found := _read(_SIZE, text)) is None:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def parse_span(text: str) -> float | None:
    """``30d`` -> seconds, ``none`` -> ``None``."""
    found = _read(_SPAN, text)
    return None if found is None else float(found[1]) * _SPAN_S[found[2]]


def _count(text: str) -> int | None:
    found = _read(re.compile(r"\d+"), text)
    return None if found is None else int(found[0])


def _name(text: str) -> str | None:
    return None if text == "none" else text


def _read(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = pattern.fullmatch(text)
    if found is None and text != "none":
        raise argparse.ArgumentTypeError(f"{text!r} is neither `none` nor such as the help shows")
    return found


def _cells(row: Quota) -> tuple[object, ...]:
    limits, account, is_one = row.limits, row.account, row.namespace is not None

    def of(held: int, most: int | None, shown: Callable[[int], str] = "{:,}".format) -> str | None:
        parts = [shown(held)] if is_one else []
        return " ".join(parts if most is None else [*parts, "of", shown(most)]) or None

    return (
        row.namespace if is_one else OTHERS,
        of(account.held.num_bytes, limits.max_bytes, size),
        of(account.held.num_tokens, limits.max_tokens),
        of(account.held.num_memories, limits.max_memories),
        limits.policy,
        None if limits.window_tokens is None else f"{limits.window_tokens:,}",
        None if limits.ttl_s is None else span(limits.ttl_s),
        f"{account.evicted_turns:,}" if is_one else None,
        f"{account.refused_turns:,}" if is_one else None,
    )
