"""Walking stored chunks along tokens, against a search that knows nothing of hashes."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from kv_agent.chunking import cut_lengths
from kv_agent.chunks import ChunkKey, chain_key, content_key
from kv_agent.vllm_plugin.chains import ChainIndex, cut_segments, walk
from tests.unit.vllm_plugin.builders import FINGERPRINT, ROOT

Path = tuple[tuple[int, ...], ...]  # the chunks from the root on, each as its tokens

part = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
stores = st.lists(st.lists(part, min_size=1, max_size=5), max_size=12)


def key_of(path: Path) -> ChunkKey:
    key = ROOT
    for tokens in path:
        key = chain_key(key, tokens)
    return key


def all_paths(sequences: Sequence[Sequence[tuple[int, ...]]]) -> set[Path]:
    return {tuple(seq[: end + 1]) for seq in sequences for end in range(len(seq))}


def longest_first_search(paths: set[Path], tokens: tuple[int, ...], start: int) -> list[tuple[Path, int]]:
    """Behind each chunk the longest stored one whose tokens come next."""
    found: list[tuple[Path, int]] = []
    here: Path = ()
    while True:
        fitting = [
            path for path in paths if path[:-1] == here and tokens[start : start + len(path[-1])] == path[-1]
        ]
        if not fitting:
            return found
        here = max(fitting, key=lambda path: len(path[-1]))
        found.append((here, start))
        start += len(here[-1])


@given(sequences=stores, gone=st.sets(st.integers(0, 30)), tokens=part, more=st.lists(part, max_size=6))
@settings(max_examples=150, deadline=None)
def test_walk_finds_what_a_brute_force_search_finds(
    sequences: list[list[tuple[int, ...]]],
    gone: set[int],
    tokens: tuple[int, ...],
    more: list[tuple[int, ...]],
) -> None:
    for extra in more:
        tokens += extra
    every = sorted(all_paths(sequences))
    paths = {path for index, path in enumerate(every) if index not in gone}
    index = ChainIndex()
    for path in every:  # lengths may be known of chunks that are gone
        index.add(key_of(path[:-1]), key_of(path), len(path[-1]))
    stored = {key_of(path) for path in paths}
    for start in (0, 2):
        found = walk(ROOT, tokens, start, index.lengths, lambda keys: stored & set(keys))
        expected = longest_first_search(paths, tokens, start)
        assert [(one.key, one.start, one.end) for one in found] == [
            (key_of(path), at, at + len(path[-1])) for path, at in expected
        ]


def test_a_chunk_longer_than_the_tokens_left_is_not_found() -> None:
    index = ChainIndex()
    index.add(ROOT, key_of(((1, 2, 3),)), 3)
    assert walk(ROOT, (1, 2), 0, index.lengths, set) == []


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 2), st.integers(0, 8), st.integers(1, 3)),
            st.tuples(st.just("discard"), st.sets(st.integers(0, 8), max_size=4)),
        ),
        max_size=25,
    )
)
@settings(max_examples=100, deadline=None)
def test_an_index_holds_what_a_plain_dict_of_chunks_holds(steps: list[tuple]) -> None:
    index = ChainIndex()
    model: dict[ChunkKey, tuple[ChunkKey, int]] = {}
    for step in steps:
        match step:
            case ("add", parent, number, length):
                index.add(ChunkKey(f"p{parent}"), ChunkKey(f"k{number}"), length)
                model.setdefault(ChunkKey(f"k{number}"), (ChunkKey(f"p{parent}"), length))
            case ("discard", numbers):
                keys = [ChunkKey(f"k{number}") for number in numbers]
                index.discard(keys)
                for key in keys:
                    model.pop(key, None)
        assert len(index) == len(model)
        assert all((f"k{number}" in index) == (f"k{number}" in model) for number in range(9))
        for parent in range(3):
            lengths = list(index.lengths(ChunkKey(f"p{parent}")))
            assert len(lengths) == len(set(lengths))
            assert set(lengths) == {n for name, n in model.values() if name == f"p{parent}"}


def test_a_length_stays_until_its_last_chunk_is_discarded() -> None:
    index = ChainIndex()
    index.add(ROOT, ChunkKey("a"), 5)
    index.add(ROOT, ChunkKey("b"), 5)
    index.add(ROOT, ChunkKey("b"), 5)  # known already
    index.discard([ChunkKey("a")])
    assert list(index.lengths(ROOT)) == [5]
    index.discard([ChunkKey("b"), ChunkKey("b"), ChunkKey("never added")])
    assert list(index.lengths(ROOT)) == []


@given(
    tokens=st.lists(st.integers(0, 70_000), max_size=40),
    start=st.integers(0, 40),
    size=st.integers(0, 40),
    chunk_tokens=st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_segments_are_the_tokens_cut_behind_each_other(
    tokens: list[int], start: int, size: int, chunk_tokens: int
) -> None:
    end = min(start + size, len(tokens))
    context = ChunkKey("context")
    segments = cut_segments(context, tokens, start, end, chunk_tokens, FINGERPRINT)

    assert [token for one in segments for token in one.token_ids] == tokens[start:end]
    assert [len(one.token_ids) for one in segments] == cut_lengths(tokens[start:end], chunk_tokens)
    for one in segments:
        assert (one.parent, one.start) == (context, start)
        assert one.key == chain_key(context, one.token_ids)
        assert one.content_key == content_key(FINGERPRINT, one.token_ids)
        context, start = one.key, one.end
    if segments:
        assert start == end
