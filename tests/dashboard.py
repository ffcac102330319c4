"""The Grafana dashboard as tests read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
from promql_parser import Expr, VectorSelector

FILE = Path(__file__).resolve().parent.parent / "dashboards" / "kv_agent.json"

# What Grafana puts in before it asks.
_VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*", "$model": ".*"}
_SUFFIX = re.compile(r"_(total|bucket|count|sum)$")


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return read


def panels() -> list[dict[str, Any]]:
    """All but the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """Of all panels, as Prometheus gets them."""
    for panel in panels():
        for target in panel["targets"]:
            yield filled(target["expr"])


def filled(expression: str) -> str:
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def selectors(expression: str) -> list[VectorSelector]:
    """The metrics that a query names; raises :class:`ValueError` where it is no PromQL."""
    found: list[VectorSelector] = []

    def visit(expr: Expr) -> None:
        if isinstance(expr, VectorSelector):
            found.append(expr)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def family_of(sample: str) -> str:
    """Of a counter or a histogram the name without what its samples add."""
    return _SUFFIX.sub("", sample)
