"""Whatever is wrong with a plan or its bytes: the answer is the computed one, and the reason is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_agent.chunks import ChunkRecord
from kv_agent.engines.base import Completion
from kv_agent.engines.vllm_local import VllmEngine
from kv_agent.storage.catalog import Catalog
from tests.engine import support

pytestmark = pytest.mark.engine


def question_behind(engine: VllmEngine, chunks: list[ChunkRecord]) -> tuple[int, ...]:
    return support.tokens_of(chunks) + support.encode(engine, support.QUESTION)


def inject(
    engine: VllmEngine,
    chunks: list[ChunkRecord],
    *,
    salt: str | None,
    scope: dict[str, str] | None = None,
    prompt: tuple[int, ...] | None = None,
) -> Completion:
    token_ids = prompt or question_behind(engine, chunks)
    fresh_start = len(support.tokens_of(chunks))
    return support.run(
        engine,
        token_ids,
        salt=salt,
        scope=scope or support.scope(),
        store=False,
        plan=support.plan(chunks, fresh_start=fresh_start),
    )


@pytest.fixture(scope="module")
def plain_answer(
    engine: VllmEngine, chunks: list[ChunkRecord], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    """The same prompt on stock vLLM without the plugin, in a process of its own."""
    script = Path(__file__).with_name("plain_vllm.py")
    out = tmp_path_factory.mktemp("plain") / "answer.json"
    request = {
        "model": str(support.EXACTNESS_MODEL),
        "options": support.ENGINE_OPTIONS,
        "prompt": question_behind(engine, chunks),
        "out": str(out),
    }
    subprocess.run(
        [sys.executable, str(script)], input=json.dumps(request), text=True, check=True, timeout=180
    )
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def chunks(engine: VllmEngine, catalog: Catalog) -> list[ChunkRecord]:
    # Salted and of their own, so that nothing of them stands in the shared prefix cache.
    one = support.capture(engine, catalog, support.encode(engine, support.STORY)[10:70], salt="capture")
    two = support.capture(engine, catalog, support.encode(engine, support.OTHER_STORY)[5:45], salt="capture")
    return [*two, *one]


def test_an_unsalted_twin_right_after_an_injection_is_computed_and_equals_plain_vllm(
    engine: VllmEngine, chunks: list[ChunkRecord], plain_answer: dict
) -> None:
    injected = inject(engine, chunks, salt="twin")
    twin = support.run(engine, question_behind(engine, chunks))

    assert injected.reuse.adapted > 0
    assert twin.reuse.local == 0
    assert list(twin.token_ids) == plain_answer["token_ids"]
    for mine, theirs in zip(twin.logprobs, plain_answer["logprobs"], strict=True):
        # Another process may sum in another order; a wrong cache entry shows in the first digits.
        assert {str(token): value for token, value in mine.items()} == pytest.approx(theirs, abs=1e-5)


def test_without_salt_nothing_is_injected(
    engine: VllmEngine, chunks: list[ChunkRecord], plain_answer: dict
) -> None:
    answer = inject(engine, chunks, salt=None)

    assert answer.reuse.exact == answer.reuse.adapted == 0
    assert set(support.refusals(answer).values()) == {"request has no cache_salt while prefix caching is on"}
    assert list(answer.token_ids) == plain_answer["token_ids"]


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        ({"namespace": "other", "user_id": "u"}, "chunk belongs to another namespace"),
        ({"namespace": "default", "user_id": "eve"}, "chunk belongs to another user"),
    ],
)
def test_a_forged_plan_is_refused_and_computed(
    engine: VllmEngine, chunks: list[ChunkRecord], plain_answer: dict, scope: dict[str, str], reason: str
) -> None:
    answer = inject(engine, chunks, salt=f"forged {scope}", scope=scope)

    assert answer.reuse.exact == answer.reuse.adapted == 0
    assert answer.reuse.computed == len(question_behind(engine, chunks))
    assert support.refusals(answer) == {chunk.key: reason for chunk in chunks}
    assert list(answer.token_ids) == plain_answer["token_ids"]


def test_tokens_that_differ_from_the_chunk_are_computed(
    engine: VllmEngine, chunks: list[ChunkRecord]
) -> None:
    tokens = list(question_behind(engine, chunks))
    tokens[chunks[0].num_tokens + 5] ^= 1

    answer = inject(engine, chunks, salt="changed", prompt=tuple(tokens))
    computed = support.run(engine, tokens)

    assert support.refusals(answer)[chunks[1].key] == "prompt tokens differ from the chunk's"
    assert answer.reuse.exact == chunks[0].num_tokens
    assert answer.token_ids == computed.token_ids


def test_an_unknown_chunk_and_what_stands_behind_it_are_computed(
    engine: VllmEngine, chunks: list[ChunkRecord]
) -> None:
    placements = support.plan(chunks, fresh_start=0)["placements"]
    placements[0]["chunk_id"] = "0" * 32
    plan = {"placements": placements, "fresh_start": len(support.tokens_of(chunks))}
    token_ids = question_behind(engine, chunks)

    answer = support.run(engine, token_ids, salt="unknown", scope=support.scope(), store=False, plan=plan)

    assert support.refusals(answer) == {
        "0" * 32: "unknown chunk",
        chunks[1].key: "tokens before the chunk are computed",
    }
    assert answer.reuse.computed == len(token_ids)


def test_the_fresh_turn_is_computed_even_if_a_plan_covers_it(
    engine: VllmEngine, chunks: list[ChunkRecord]
) -> None:
    tokens = support.tokens_of(chunks)
    answer = support.run(
        engine,
        tokens,
        salt="all of it",
        scope=support.scope(),
        store=False,
        plan=support.plan(chunks, fresh_start=len(tokens)),
    )

    assert answer.reuse.exact == chunks[0].num_tokens
    assert support.refusals(answer) == {chunks[1].key: "chunk reaches into the fresh turn"}


def test_malformed_options_are_told_and_the_request_is_served(engine: VllmEngine) -> None:
    from kv_agent.errors import ConfigError

    token_ids = support.encode(engine, support.QUESTION)
    with pytest.raises(ConfigError, match=r"kv_transfer_params.kv_agent: typo"):
        support.run(engine, token_ids, typo=1)
    assert len(support.run(engine, token_ids).token_ids) == 24


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(delete, "blob is missing"), (truncate, "blob is corrupt"), (flip_one_byte, "blob is corrupt")],
)
def test_a_damaged_blob_is_computed_told_and_quarantined(
    engine: VllmEngine,
    catalog: Catalog,
    store_dir: Path,
    chunks: list[ChunkRecord],
    plain_answer: dict,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    scope = support.scope(damage.__name__)  # a user of its own, so that the blobs are its own
    mine = [support.capture(engine, catalog, chunk.token_ids, scope=scope)[0] for chunk in chunks]
    damage(store_dir / mine[1].blob)
    _push_out_of_host_memory(engine, catalog, damage.__name__)

    answer = inject(engine, mine, salt=damage.__name__, scope=scope)

    assert list(answer.token_ids) == plain_answer["token_ids"]
    assert support.refusals(answer)[mine[1].key] == reason
    assert answer.reuse.exact + answer.reuse.local + answer.reuse.computed == len(
        question_behind(engine, mine)
    )
    assert catalog.chunks([mine[1].key])[mine[1].key].quarantined
    # Computed again, it is stored again.
    healed = support.capture(engine, catalog, mine[1].token_ids, scope=scope)
    assert healed[0].key == mine[1].key
    assert not healed[0].quarantined


def _push_out_of_host_memory(engine: VllmEngine, catalog: Catalog, label: str) -> None:
    """Store more than the host cache holds, so that the next load must read its blob."""
    story = support.encode(engine, support.STORY)
    for index in range(4):
        filler = tuple((story * 6)[index : index + 900])
        support.capture(engine, catalog, filler, scope=support.scope(f"filler {label} {index}"))
