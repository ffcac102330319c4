"""How long queries take, alone and in a crowd, beside the probe that each of them waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

from benchmarks.serving_speed.crowd import Answer, Crowd, Member
from benchmarks.storage_speed.timing import percentile

NAMES = ("Mara Dubois", "Hugo Thomsen", "Lena Holm", "Otto Flores", "Nina Okafor", "Uma Berg")
Talk = Callable[[Member, int], Awaitable[Answer]]  # a member's next request, by its number


class _Answered(NamedTuple):
    answers: list[Answer]
    seconds: float


async def measure(
    crowd: Crowd, members: Sequence[Member], *, levels: Sequence[int], num_listeners: int, seconds: float
) -> AsyncIterator[dict[str, Any]]:
    """Rows of queries by so many clients at a time, then of a tenth of all members beside the chats of all.

    Each member has three memories at first; listeners hear of everything meanwhile.
    """
    for number, member in enumerate(members):
        for turn in range(3):
            checked(await crowd.chat(member, _said(number, turn), top_k=0))

    def query(mode: str) -> Talk:
        return lambda member, number: crowd.query(member, _asked(number), mode=mode)

    def chat(member: Member, number: int) -> Awaitable[Answer]:
        return crowd.chat(member, _said(number, number))

    async with crowd.listening([members[i % len(members)] for i in range(num_listeners)]):
        common = {"listeners": num_listeners, "memories_of_each": 3}
        for mode in ("hybrid", "lexical"):
            for level in levels:
                await _during(members[:level], query(mode), seconds / 4)  # warm-up
                found = await _during(members[:level], query(mode), seconds)
                yield {"part": "query", "mode": mode, "clients": level, **common, **_times(found)}
        beside = asyncio.create_task(_during(members, chat, seconds))
        few = members[: len(members) // 10 or 1]
        found = await _during(few, query("hybrid"), seconds)
        chats = await beside
        yield {
            "part": "query beside chats",
            "mode": "hybrid",
            "clients": len(few),
            **common,
            **_times(found),
            "chats": {"clients": len(members), **_times(chats)},
        }


async def _during(members: Sequence[Member], talk: Talk, seconds: float) -> _Answered:
    """What all were answered that ask again as soon as they are answered."""
    started = time.perf_counter()
    end = started + seconds

    async def one(member: Member, first: int) -> list[Answer]:
        found = []
        for number in count(first):
            found.append(checked(await talk(member, number)))
            if time.perf_counter() > end:
                break
        return found

    answers = await asyncio.gather(*(one(member, number) for number, member in enumerate(members)))
    return _Answered([answer for of_one in answers for answer in of_one], time.perf_counter() - started)


def checked(answer: Answer) -> Answer:
    """Raise unless it was answered well."""
    if answer.status != 200:
        raise SystemExit(f"{answer.status}: {dict(answer.body)}")
    return answer


def _times(answered: _Answered) -> dict[str, Any]:
    """Milliseconds as percentiles: until the client has its answer, of the service, of the probe in that."""
    answers, seconds = answered
    found: dict[str, Any] = {
        "count": len(answers),
        "per_s": round(len(answers) / seconds, 1),
        "answer_ms": _spread([answer.took_s * 1000 for answer in answers]),
    }
    if "probe_ms" in answers[0].body:
        found["service_ms"] = _spread([answer.body["took_ms"] for answer in answers])
        found["probe_ms"] = _spread([answer.body["probe_ms"] for answer in answers])
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": round(percentile(values, share / 100), 1) for share in (50, 95, 99)}


def _said(number: int, turn: int) -> str:
    return f"{NAMES[(number + turn) % len(NAMES)]} has badge {number} in round {turn}."


def _asked(number: int) -> str:
    return f"Which badge does {NAMES[number % len(NAMES)]} have?"
