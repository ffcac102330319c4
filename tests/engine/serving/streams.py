"""Streams of answers as what they add up to."""

from __future__ import annotations

import json
from typing import Any

# vLLM sends tokens together that come while it is busy: how a stream is cut tells nothing of the answer.
GROWING = {"content", "arguments", "delta", "token_ids"}


def put_together(body: bytes) -> list[Any]:
    """A stream as if all that belongs together had been sent at once."""
    events: list[Any] = []
    for line in body.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        event.pop("sequence_number", None)
        alike = bool(events) and events[-1].get("type") == event.get("type")
        if alike and ("choices" in event or "delta" in event):
            events[-1] = grown(events[-1], event)
        else:
            events.append(event)
    return events


def grown(one: Any, other: Any, name: str = "") -> Any:
    """Two parts of a stream as one: texts and lists that grow go on, of anything else the later counts."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: grown(one.get(key), other.get(key), key) for key in dict.fromkeys((*one, *other))}
    if name in GROWING and isinstance(one, str | list) and type(one) is type(other):
        return one + other
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [grown(mine, theirs) for mine, theirs in zip(one, other, strict=True)]
    return one if other is None or other == [] else other
