"""Where there is a key, only fields that it signed are followed."""

from __future__ import annotations

import pytest

from kv_agent.vllm_plugin.signing import SIGNING_ENV, make_key, signed, signing_key, verified
from tests.unit.vllm_plugin.builders import FakeCatalog
from tests.unit.vllm_plugin.scheduling import Desk, request

KEY = b"secret"
OPTIONS = {"scope": {"user_id": "amy", "agent_id": None}, "store": True, "plan": {"placements": [[1, 2.5]]}}


def test_what_was_signed_is_verified_and_comes_back_without_the_signature() -> None:
    fields = signed(OPTIONS, KEY)
    assert fields["signature"]
    assert verified(fields, KEY) == OPTIONS
    assert verified(dict(reversed(fields.items())), KEY) == OPTIONS


@pytest.mark.parametrize(
    "change",
    [
        {"store": False},
        {"scope": {"user_id": "eve", "agent_id": None}},
        {"more": 1},
        {"signature": "0" * 64},
        {"signature": None},
        {"signature": "é"},
        {"signature": ["x"]},
    ],
)
def test_anything_else_is_not(change: dict[str, object]) -> None:
    assert verified({**signed(OPTIONS, KEY), **change}, KEY) is None


@pytest.mark.parametrize("options", [OPTIONS, {}, [], "x", 7, None, {"signature": "x", 1: object()}])
def test_what_nobody_signed_is_not(options: object) -> None:
    assert verified(options, KEY) is None
    assert verified(signed(OPTIONS, b"another"), KEY) is None


def test_without_a_key_everything_counts() -> None:
    assert signed(OPTIONS, None) == OPTIONS
    assert verified(OPTIONS, None) is OPTIONS


def test_a_key_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIGNING_ENV, raising=False)
    assert signing_key() is None
    make_key()
    key = signing_key()
    make_key()
    assert key is not None
    assert signing_key() == key


def test_an_unsigned_request_is_served_as_if_it_had_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SIGNING_ENV, KEY.decode())
    desk = Desk(FakeCatalog())
    try:
        forged = request((1, 2, 3), "forged", store=True)
        desk.side.new_request(forged)
        assert desk.side.finished(forged, (), complete=True) == (False, None)
        assert desk.side.counters == {"rejected_requests|unsigned": 1}

        good = request((1, 2, 3), "good", store=True)
        params = good.kv_transfer_params
        assert params is not None
        params["kv_agent"] = signed(params["kv_agent"], KEY)
        desk.side.new_request(good)
        desk.wait_looked_up()
        _, answer = desk.side.finished(good, (0,), complete=False)
        assert answer is not None
        assert "error" not in answer["kv_agent"]
    finally:
        desk.close()
