"""The Grafana dashboard asks for what there is, shows all of it, and is one that Grafana takes."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from prometheus_client import CollectorRegistry

from kv_agent.serving.metrics import PREFIX, ServerMetrics
from kv_agent.vllm_plugin.tally import COUNTERS, GAUGES
from tests.dashboard import dashboard, expressions, family_of, panels, selectors

# vLLM's own that are used; a test on a real server looks whether it has them.
VLLMS = {"vllm:time_to_first_token_seconds": {"model_name", "engine"}}
OF_ALL = {"instance"}
WIDTH = 24


def labels_by_family() -> dict[str, set[str]]:
    """What this package exports."""
    metrics = ServerMetrics(CollectorRegistry())
    own = [*vars(metrics).values(), *metrics._gauges.values()]
    served = {one._name: set(one._labelnames) for one in own if hasattr(one, "_labelnames")}
    engines = {
        PREFIX + name: {family.label, "model_name", "engine"} for name, family in (COUNTERS | GAUGES).items()
    }
    assert not served.keys() & engines.keys()
    return served | engines


def test_every_query_is_promql_that_names_what_is_exported() -> None:
    known = labels_by_family() | VLLMS
    for expression in expressions():
        used = selectors(expression)
        assert used, expression
        for selector in used:
            assert selector.name is not None
            family = family_of(selector.name)
            assert family in known, expression
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert "instance" in matched, expression
            assert matched <= known[family] | OF_ALL, expression
            assert ("model_name" in matched) == ("model_name" in known[family]), expression


@pytest.mark.parametrize("broken", ["sum(rate(x[1m])", "rate(x)", "sum by (x y)", "histogram_quantile(x)"])
def test_the_parser_refuses_what_is_no_promql(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        selectors(broken)


def test_every_family_is_shown() -> None:
    shown = {family_of(str(one.name)) for expression in expressions() for one in selectors(expression)}
    assert labels_by_family().keys() - shown == set()


def test_counters_are_shown_as_rates_and_gauges_as_they_are() -> None:
    registry = CollectorRegistry()
    ServerMetrics(registry)
    counters = {family.name for family in registry.collect() if family.type == "counter"}
    counters |= {PREFIX + name for name in COUNTERS}
    for expression in expressions():
        for selector in selectors(expression):
            name = str(selector.name)
            assert (family_of(name) in counters) == name.endswith("_total"), expression
            if name.endswith(("_total", "_bucket", "_count")):
                assert re.search(rf"(rate|increase)\({name}\b", expression), expression


def test_panels_have_ids_descriptions_units_and_the_variables_of_the_dashboard() -> None:
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {one["name"] for one in dashboard()["templating"]["list"]}
    assert variables == {"datasource", "model", "instance"}
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == wanted
        for target in panel["targets"]:
            assert target["datasource"] == wanted
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
    queries = [one for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    assert all(one["datasource"] == wanted for one in queries)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard())))
    assert used - {"__rate_interval", "__range", "__all"} == variables


def test_no_panel_overlaps_another_or_leaves_the_page() -> None:
    taken: dict[tuple[int, int], int] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= WIDTH
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"panels {taken[cell]} and {panel['id']}"
            taken[cell] = panel["id"]


def test_rows_are_in_order_and_a_current_grafana_reads_it() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == [
        "Reuse", "Latency", "Tiers and store", "Retrieval", "Refusals and failures", "Requests"
    ]  # fmt: skip
    assert dashboard()["schemaVersion"] >= 39
    assert dashboard().get("id") is None  # Grafana gives its own
