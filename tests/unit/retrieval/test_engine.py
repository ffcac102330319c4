"""Retrieval over a feed: turns, copies, namespaces, snapshots, and a catalog started again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from kv_agent.chunks import ChunkKey, IndexChange, Scope
from kv_agent.errors import KVAgentError
from kv_agent.retrieval.engine import MemoryHit, RetrievalEngine
from tests.unit.retrieval.histories import DIM, FINGERPRINT, FakeFeed, Vector, change, random_history


def towards(angle_deg: float) -> Vector:
    """A unit vector at this angle to :data:`QUERY`."""
    vector = np.zeros(DIM, dtype=np.float32)
    vector[:2] = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return vector


QUERY = towards(0)


def ballast(first_seq: int, count: int = 20) -> list[IndexChange]:
    """The opposite of everything near the query, so that centring does not turn the order around."""
    return [change(first_seq + i, -towards(i / 100), turn=f"ballast{i}") for i in range(count)]


def engine(feed: FakeFeed, folder: Path | None = None) -> RetrievalEngine:
    return RetrievalEngine(feed, FINGERPRINT, folder)


def turns(hits: list[MemoryHit]) -> list[str]:
    return [hit.turn_id for hit in hits]


def test_a_turn_has_the_score_of_its_best_chunk_and_its_chunks_in_order() -> None:
    feed = FakeFeed(
        [
            change(1, towards(40), turn="a"),
            change(2, towards(5), turn="b"),
            change(3, towards(10), turn="a"),
            change(4, towards(60), turn="b"),
            *ballast(10),
        ]
    )
    best, second, *_ = engine(feed).search(QUERY, Scope(), 5)
    assert (best.turn_id, best.chunk_keys) == ("b", ("chunk2", "chunk4"))
    assert (second.turn_id, second.chunk_keys) == ("a", ("chunk3", "chunk1"))
    assert best.score > second.score


def test_a_text_stored_in_several_sessions_appears_once_as_its_newest_copy() -> None:
    feed = FakeFeed(
        [
            change(1, towards(5), turn="old", content="same"),
            change(2, towards(9), turn="new", content="same"),
            change(3, towards(7), turn="middle"),
            *ballast(10),
        ]
    )
    hits = engine(feed).search(QUERY, Scope(), 2)
    assert turns(hits) == ["new", "middle"]  # the text keeps the place of its best copy
    assert hits[0].chunk_keys == ("chunk2",)


def test_copies_of_other_users_are_not_taken() -> None:
    feed = FakeFeed(
        [
            change(1, towards(5), turn="mine", content="same", scope=Scope(user_id="me")),
            change(2, towards(5), turn="theirs", content="same", scope=Scope(user_id="them")),
        ]
    )
    assert turns(engine(feed).search(QUERY, Scope(user_id="me"), 2)) == ["mine"]


def test_more_candidates_are_asked_for_when_grouping_leaves_too_few() -> None:
    crowd = [change(i, towards(i / 100), turn="crowd") for i in range(1, 501)]
    copies = [change(i, towards(6), turn=f"copy{i}", content="same") for i in range(501, 701)]
    feed = FakeFeed([*crowd, *copies, change(800, towards(20), turn="last"), *ballast(900, 700)])
    hits = engine(feed).search(QUERY, Scope(), 3)
    assert turns(hits) == ["crowd", "copy700", "last"]


def test_fewer_turns_than_asked_for_are_all_returned() -> None:
    assert turns(engine(FakeFeed([change(1, QUERY, turn="only")])).search(QUERY, Scope(), 10)) == ["only"]
    assert engine(FakeFeed()).search(QUERY, Scope(), 10) == []


def test_top_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        engine(FakeFeed()).search(QUERY, Scope(), 0)


def test_a_search_sees_what_was_stored_and_forgotten_just_before() -> None:
    feed = FakeFeed([change(1, QUERY, turn="a")])
    searching = engine(feed)
    assert turns(searching.search(QUERY, Scope(), 5)) == ["a"]
    feed.changes.append(change(2, QUERY, turn="b"))
    assert set(turns(searching.search(QUERY, Scope(), 5))) == {"a", "b"}
    feed.changes.append(change(3, None, entry_id=1, turn="a"))
    assert turns(searching.search(QUERY, Scope(), 5)) == ["b"]


def test_more_changes_than_one_step_are_all_followed() -> None:
    history = random_history(np.random.default_rng(0), 3500, removals=0.1)
    feed = FakeFeed(history)
    gone = {c.entry_id for c in history if c.vector is None}
    scope = Scope(user_id="user1")
    expected = {c.turn_id for c in history if scope.admits(c.scope) and c.entry_id not in gone}
    assert set(turns(engine(feed).search(QUERY, scope, 5000))) == expected


def test_namespaces_do_not_see_each_other() -> None:
    feed = FakeFeed(
        [
            change(1, QUERY, turn="a", scope=Scope(namespace="one")),
            change(2, QUERY, turn="b", scope=Scope(namespace="two")),
        ]
    )
    searching = engine(feed)
    assert turns(searching.search(QUERY, Scope(namespace="one"), 5)) == ["a"]
    assert turns(searching.search(QUERY, Scope(namespace="two"), 5)) == ["b"]
    assert searching.search(QUERY, Scope(namespace="../three\0"), 5) == []


def test_a_new_process_follows_on_from_the_snapshot(tmp_path: Path) -> None:
    history = random_history(np.random.default_rng(1), 2500)
    first = engine(FakeFeed(history[:2000]), tmp_path)
    first.search(QUERY, Scope(), 1)
    first.close()
    feed = FakeFeed(history)
    second = engine(feed, tmp_path)
    scope = Scope(user_id="user2")
    assert second.search(QUERY, scope, 50) == engine(FakeFeed(history)).search(QUERY, scope, 50)
    assert feed.num_calls == 2  # the new changes, and that there are no more


def test_a_damaged_snapshot_is_built_anew_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    feed = FakeFeed(random_history(np.random.default_rng(2), 50))
    first = engine(feed, tmp_path)
    expected = first.search(QUERY, Scope(user_id="user0"), 9)
    first.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert engine(feed, tmp_path).search(QUERY, Scope(user_id="user0"), 9) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("num_new", [0, 3, 50, 80])
def test_a_catalog_started_again_is_not_mixed_with_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_new: int
) -> None:
    """Also when the new one is as long as the old one, or longer: a sequence number alone would not tell."""
    old = engine(FakeFeed([change(i, QUERY, turn=f"old{i}") for i in range(1, 51)]), tmp_path)
    old.search(QUERY, Scope(), 1)
    old.close()
    feed = FakeFeed([change(i, QUERY, turn=f"new{i}") for i in range(1, num_new + 1)])
    found = engine(feed, tmp_path).search(QUERY, Scope(), 1000)
    assert set(turns(found)) == {f"new{i}" for i in range(1, num_new + 1)}
    assert len(caplog.records) == 1


def test_a_catalog_started_again_under_a_running_engine_is_noticed(tmp_path: Path) -> None:
    feed = FakeFeed([change(i, QUERY, turn=f"old{i}") for i in range(1, 10)])
    searching = engine(feed, tmp_path)
    searching.search(QUERY, Scope(), 1)
    searching.save_snapshots()
    feed.changes = [change(1, QUERY, turn="new")]
    assert turns(searching.search(QUERY, Scope(), 9)) == ["new"]
    searching.close()
    assert turns(engine(feed, tmp_path).search(QUERY, Scope(), 9)) == ["new"]


def test_an_unchanged_index_is_not_written_again(tmp_path: Path) -> None:
    feed = FakeFeed([change(1, QUERY)])
    searching = engine(feed, tmp_path)
    searching.search(QUERY, Scope(), 1)
    searching.save_snapshots()
    (path,) = tmp_path.iterdir()
    path.unlink()
    searching.save_snapshots()
    assert not path.exists()
    feed.changes.append(change(2, QUERY))
    searching.search(QUERY, Scope(), 1)
    searching.save_snapshots()
    assert path.exists()


def test_a_snapshot_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    searching = engine(FakeFeed([change(1, QUERY)]), tmp_path / "file")
    searching.search(QUERY, Scope(), 1)
    searching.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_closed_index_is_not_searched() -> None:
    searching = engine(FakeFeed(random_history(np.random.default_rng(7), 30)))
    searching.search(QUERY, Scope(user_id="user0"), 3)
    searching.close()
    searching.close()
    with pytest.raises(KVAgentError, match="is closed; open a new CacheManager"):
        searching.search(QUERY, Scope(user_id="user0"), 3)


def test_threads_may_search_while_the_catalog_grows() -> None:
    feed = FakeFeed()
    searching = engine(feed)
    problems: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(50):
                searching.search(QUERY, Scope(), 5)
        except BaseException as err:  # noqa: BLE001
            problems.append(err)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(1, 200):
        feed.changes.append(change(i, towards(i), turn=f"turn{i}"))
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(searching.search(QUERY, Scope(), 1000)) == 199


def random_texts(rng: np.random.Generator, num_texts: int, num_tokens: int) -> FakeFeed:
    """Turns of one chunk each, ``turn1`` with ``chunk1`` and so on."""
    feed = FakeFeed()
    for number in range(1, num_texts + 1):
        tokens = rng.normal(size=(num_tokens, DIM)).astype(np.float32)
        feed.changes.append(change(number, tokens.mean(axis=0), turn=f"turn{number}"))
        feed.tokens[f"chunk{number}"] = tokens
    return feed


def test_candidates_are_compared_token_by_token() -> None:
    """Their means are alike; one has the token that was asked for."""
    feed = random_texts(np.random.default_rng(5), 300, 6)
    asked = feed.tokens["chunk170"][2:4]
    searching = engine(feed)
    best, second, *_ = searching.search(asked, Scope(), 5)
    assert best.turn_id == "turn170"
    assert best.score > 3 * second.score
    feed.tokens.clear()  # then only means are left
    assert engine(feed).search(asked, Scope(), 300)[0].score < best.score


def test_turns_found_elsewhere_are_compared_however_far_their_mean_is() -> None:
    rng = np.random.default_rng(6)
    feed = random_texts(rng, 1200, 2)
    query = rng.normal(size=(1, DIM)).astype(np.float32)
    feed.tokens["chunk1201"] = np.concatenate([query, -9 * query])
    feed.changes.append(change(1201, feed.tokens["chunk1201"].mean(axis=0), turn="far"))
    searching = engine(feed)
    assert "far" not in turns(searching.search(query, Scope(), 200))
    assert turns(searching.search(query, Scope(), 200, also=["far", "unknown"]))[0] == "far"  # type: ignore[list-item]
    assert turns(searching.search(query, Scope(), 9, only=["far", "turn5"])) == ["far", "turn5"]  # type: ignore[list-item]
    assert turns(searching.search(query, Scope(), 9, also=["far"], only=["turn5"])) == ["turn5"]  # type: ignore[list-item]
    assert searching.search(query, Scope(user_id="other"), 9, also=["far"]) == []  # type: ignore[list-item]


def test_a_snapshot_keeps_the_space_and_the_background(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    feed = FakeFeed()
    for number in range(1, 41):
        tokens = rng.normal(size=(3, DIM)).astype(np.float32)
        feed.changes.append(change(number, tokens.mean(axis=0)))
        feed.tokens[f"chunk{number}"] = tokens
    query = feed.tokens["chunk9"]
    first = engine(feed, tmp_path)
    expected = first.search(query, Scope(), 40)
    first.close()
    assert engine(feed, tmp_path).search(query, Scope(), 40) == expected


def test_a_damaged_sketch_costs_its_tokens_only(caplog: pytest.LogCaptureFixture) -> None:
    class Damaged(FakeFeed):
        def sketches(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, bytes]:
            return dict.fromkeys(keys, b"\x01\x02")

    feed = Damaged([change(1, QUERY, turn="a"), change(2, -QUERY, turn="b")])
    assert turns(engine(feed).search(QUERY, Scope(), 5)) == ["a", "b"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_namespaces_that_nobody_searches_are_saved_and_dropped(tmp_path: Path) -> None:
    feed = FakeFeed([change(i, QUERY, turn=f"t{i}", scope=Scope(namespace=f"n{i}")) for i in range(1, 51)])
    searching = RetrievalEngine(feed, FINGERPRINT, tmp_path, max_bytes=1_000)
    for _ in range(2):
        for i in range(1, 51):
            assert turns(searching.search(QUERY, Scope(namespace=f"n{i}"), 5)) == [f"t{i}"]
    assert 1 <= searching.num_loaded < 10
    assert len(list(tmp_path.iterdir())) >= 40
    feed.changes.append(change(99, QUERY, turn="later", scope=Scope(namespace="n1")))
    assert set(turns(searching.search(QUERY, Scope(namespace="n1"), 5))) == {"t1", "later"}


def test_an_idle_namespace_goes_when_another_is_searched() -> None:
    feed = FakeFeed([change(i, QUERY, turn=f"t{i}", scope=Scope(namespace=f"n{i}")) for i in range(1, 4)])
    searching = RetrievalEngine(feed, FINGERPRINT, None, idle_s=0.0)
    for i in range(1, 4):
        assert turns(searching.search(QUERY, Scope(namespace=f"n{i}"), 5)) == [f"t{i}"]
        assert searching.num_loaded == 1
