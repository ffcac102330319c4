"""Every log record has fields for machines, from a vocabulary that the documentation lists."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "event", "reason", "chunk", "namespace", "tier", "request", "count", "seconds", "store", "fingerprint"
}  # fmt: skip
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


class Record(NamedTuple):
    """A call of a logger: where it stands, what it prints, and the names of its ``extra`` fields."""

    place: str
    message: ast.expr
    fields: list[str]
    event: ast.expr | None


def records(source: str, name: str) -> Iterator[Record]:
    """The calls of a module's logger; ``extra`` is a dictionary there, or a name that has one above."""
    tree = ast.parse(source)
    calls: list[ast.Call] = []
    named: list[tuple[int, str, ast.Dict]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Dict() as value):
                named.append((node.lineno, target, value))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=level)) if level in LEVELS:
                calls.append(node)
    for call in calls:
        extra = next((word.value for word in call.keywords if word.arg == "extra"), None)
        if isinstance(extra, ast.Name):
            above = [(line, one) for line, target, one in named if target == extra.id and line < call.lineno]
            extra = max(above, key=lambda known: known[0])[1] if above else None
        fields = extra if isinstance(extra, ast.Dict) else ast.Dict(keys=[], values=[])
        names = [key.value if isinstance(key, ast.Constant) else "?" for key in fields.keys]
        event = fields.values[0] if names[:1] == ["event"] else None
        yield Record(f"{name}:{call.lineno}", call.args[0], list(map(str, names)), event)


def package() -> list[Record]:
    return [
        record
        for path in sorted((ROOT / "kv_agent").rglob("*.py"))
        for record in records(path.read_text(encoding="utf-8"), path.name)
    ]


def told_events() -> set[str]:
    """Those that the code writes out; eviction passes some on by name."""
    eviction = (ROOT / "kv_agent" / "storage" / "eviction.py").read_text(encoding="utf-8")
    passed_on = set(re.findall(r'self\._warn\(\s*"(\w+)"', eviction))
    written = {str(one.event.value) for one in package() if isinstance(one.event, ast.Constant)}
    return written | passed_on


def test_every_record_says_first_which_event_it_tells_of() -> None:
    found = package()
    assert len(found) > 30
    for record in found:
        assert record.event is not None, record.place
        assert set(record.fields) <= FIELDS, record.place


def test_messages_are_sentences_of_the_code_with_values_beside() -> None:
    """Not texts put together: what stands in them could be anything."""
    for record in package():
        assert isinstance(record.message, ast.Constant), record.place


def test_fields_are_none_that_logging_has_itself() -> None:
    own = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
    assert not FIELDS & own


def test_the_documentation_lists_all_events_and_fields_and_no_others() -> None:
    section = PAGE[PAGE.index("## Logs") : PAGE.index("## Keys")]
    rows = re.findall(r"^\| (`.*`) \|", section, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(set(listed)) == len(listed)
    assert set(listed) - {"event"} == told_events()
    introduction = section[: section.index("\n| `event`")]
    assert set(re.findall(r"`(\w+)`", introduction)) - {"kv_agent"} == FIELDS


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ("logger.warning('x', extra={'event': 'e', 'chunk': c})", "e"),
        ("about = {'event': 'e'}\nlogger.info('x', extra=about)\nabout = {'event': 'f'}", "e"),
        ("logger.warning('x')", None),
        ("logger.warning('x', extra={'chunk': c})", None),
        ("logger.warning('x', extra=anything)", None),
    ],
)
def test_the_rule_finds_what_breaks_it(source: str, event: str | None) -> None:
    (record,) = records(source, "module")
    found = record.event.value if isinstance(record.event, ast.Constant) else None
    assert found == event
