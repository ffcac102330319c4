"""The routes against their own description: what it allows is answered as it says, the rest is refused."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import negative_data_rejection, positive_data_acceptance

from tests.engine.serving.server_process import MemoryServerProcess

pytestmark = pytest.mark.engine

EXAMPLES = 30  # right ones of each operation, and as many wrong ones
OPERATIONS = [
    ("POST", "/memory/store"),
    ("POST", "/memory/query"),
    ("POST", "/memory/forget"),
    ("GET", "/memory"),
    ("GET", "/memory/namespaces"),
    ("GET", "/memory/users"),
    ("GET", "/memory/sessions"),
    ("GET", "/memory/requests"),
    ("GET", "/memory/stats"),
    ("GET", "/memory/health"),
    ("GET", "/memory/{memory_id}"),
    ("GET", "/memory/{memory_id}/chunks"),
    ("DELETE", "/memory/{memory_id}"),
    ("PUT", "/memory/{memory_id}/pin"),
    ("DELETE", "/memory/{memory_id}/pin"),
]
# Nothing about health can be wrong.
CASES = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in schemathesis.GenerationMode
    if (path, mode) != ("/memory/health", schemathesis.GenerationMode.NEGATIVE)
]


@pytest.fixture(scope="session")
def description(memory_server: MemoryServerProcess) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{memory_server.base_url}/openapi.json")


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=str)
def test_every_route_keeps_to_its_description(
    description: schemathesis.BaseSchema,
    memory_server: MemoryServerProcess,
    method: str,
    path: str,
    mode: schemathesis.GenerationMode,
) -> None:
    operation = description[path][method]
    headers = {"Authorization": f"Bearer {memory_server.keys['other']}"}

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        # A description cannot say that a cursor is one of ours, or that a filter or `all` is needed.
        excluded = [positive_data_acceptance]
        if method != "POST":
            # In a query a list of one is written as the one is, so not all that was made wrong is wrong.
            excluded.append(negative_data_rejection)
        case.call_and_validate(headers=headers, excluded_checks=excluded)

    check()
