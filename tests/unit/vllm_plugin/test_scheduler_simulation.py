"""A whole engine in miniature, where KV is a hash of everything it depends on, led by the scheduler's half.

One token's KV here is ``(hash of its token and of all KV before it, its position)``. Moving a chunk changes
positions only, computing it anew changes the hash as soon as anything before it differs, and so does storing
it with loss. So whether two KV are bit-identical, which is what "exact" promises, can be decided by comparing
them.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

from kv_agent.chunks import ChunkKey, ChunkRecord
from kv_agent.vllm_plugin.jobs import CaptureJob, ChunkLoad, LoadFailure, ResidentChanges, WorkerReport
from tests.unit.vllm_plugin.builders import ROOT, FakeCatalog, Placed, plan_options
from tests.unit.vllm_plugin.scheduling import BLOCK, Desk, FakeRequest, request

Kv = tuple[int, int]
ALPHABET = 3  # few tokens, so that equal texts come up by chance
MAX_PROMPT = 40


def computed(token: int, before: list[Kv]) -> Kv:
    return hash((token, tuple(before))), len(before)


def is_as_computed(tokens: list[int], kv: list[Kv], position: int) -> bool:
    return kv[position] == computed(tokens[position], kv[:position])


@dataclass(slots=True)
class Engine:
    """Prefix cache by salt, a store of chunks, and up to three requests whose lives interleave."""

    rng: random.Random
    salt_per_plan: bool
    desk: Desk = field(default_factory=lambda: Desk(FakeCatalog()))
    prefix_cache: dict[tuple[str | None, tuple[int, ...]], list[Kv]] = field(default_factory=dict)
    stored: dict[ChunkKey, tuple[Kv, ...]] = field(default_factory=dict)
    plain: set[ChunkKey] = field(default_factory=set)  # of ordinary text only
    unsettled: list[CaptureJob] = field(default_factory=list)
    past: list[tuple[list[int], list[Placed], int]] = field(default_factory=list)
    running: list[Generator[None]] = field(default_factory=list)
    number: int = 0
    residents: dict[ChunkKey, str | None] = field(default_factory=dict)  # as the desk was told
    num_reports: int = 0

    def step(self) -> None:
        if self.rng.random() < 0.05:
            lost = self.rng.choice([0.2, 0.5, 1.0])
            for block in [block for block in self.prefix_cache if self.rng.random() < lost]:
                del self.prefix_cache[block]
        for job in [job for job in self.unsettled if self.rng.random() < 0.1]:
            self.unsettled.remove(job)
            if self.rng.random() < 0.2:
                self.desk.lose(job)
            else:
                self.desk.store(job)
        if len(self.running) < 3 and self.rng.random() < 0.4:
            self.running.append(self._serve(self._next_request()))
        if self.running:
            self._advance(self.rng.choice(self.running))

    def drain(self) -> None:
        while self.running:
            self._advance(self.running[0])

    def _advance(self, one: Generator[None]) -> None:
        if next(one, "ended") == "ended":
            self.running.remove(one)

    # -- requests -----------------------------------------------------------------------------------

    def _next_request(self) -> FakeRequest:
        self.number += 1
        if self.past and self.rng.random() < 0.4:
            tokens, placements, fresh_start = self.rng.choice(self.past[-3:])
            if self.rng.random() < 0.4:
                placements = placements[: self.rng.randint(0, len(placements))]
            return self._request(tokens, placements, fresh_start)
        tokens, placements = self._begin()
        records = list(self.desk.catalog.records.values())
        while records and len(tokens) < MAX_PROMPT // 2 and self.rng.random() < 0.6:
            if self.rng.random() < 0.2:
                tokens += self._text(1, 4)
            fitting = [one for one in records if one.start == len(tokens)]
            one = self.rng.choice(fitting if fitting and self.rng.random() < 0.5 else records)
            skip = self.rng.randint(0, one.num_tokens - 1) if self.rng.random() < 0.3 else 0
            placements.append((one, len(tokens), skip))
            tokens += one.token_ids[skip:]
        fresh_start = len(tokens)
        tokens += self._text(1, 7)
        if self.rng.random() < 0.2:
            placements += self._chunks_found_on(tokens[:fresh_start], records)
        self.past.append((tokens, placements, fresh_start))
        return self._request(tokens, placements, fresh_start)

    def _request(self, tokens: list[int], placements: list[Placed], fresh_start: int) -> FakeRequest:
        options = plan_options(*placements, fresh_start=fresh_start) if placements else None
        extra = {"content_start": fresh_start} if self.rng.random() < 0.3 else {}
        salt = self.rng.choice([None, "one", "one", "two"])
        if self.salt_per_plan:
            salt = repr([(one.key, *rest) for one, *rest in placements]) if placements else None
        return request(tokens, f"r{self.number}", plan=options, salt=salt, **extra)

    def _begin(self) -> tuple[list[int], list[Placed]]:
        """Nothing, or a piece of an earlier prompt with its plan, part of it or none of it."""
        if not self.past or self.rng.random() < 0.4:
            return [], []
        tokens, placements, _ = self.rng.choice(self.past[-4:])
        tokens = tokens[: self.rng.choice([len(tokens), self.rng.randint(0, len(tokens))])]
        kept = [
            (one, start, *skip)
            for one, start, *skip in placements
            if start + one.num_tokens - sum(skip) <= len(tokens)
        ]
        return list(tokens), kept[: self.rng.choice([len(kept), len(kept), self.rng.randint(0, len(kept))])]

    def _text(self, low: int, high: int) -> list[int]:
        return [self.rng.randrange(ALPHABET) for _ in range(self.rng.randint(low, high))]

    def _chunks_found_on(self, tokens: list[int], records: list[ChunkRecord]) -> list[Placed]:
        """Any chunk wherever its tokens happen to stand, fitting or not."""
        return [
            (one, start)
            for one in self.rng.sample(records, min(3, len(records)))
            for start in range(len(tokens))
            if tuple(tokens[start : start + one.num_tokens]) == one.token_ids
        ][:3]

    def _serve(self, one: FakeRequest) -> Generator[None]:
        """One request's life; at each ``yield`` others may go on."""
        if self.rng.random() < 0.1:
            one.kv_transfer_params = None  # somebody who does not know us
        num_prompt = one.num_prompt_tokens
        self.desk.side.new_request(one)
        yield
        kv = yield from self._cached_or_loaded(one)
        if kv is not None and self.rng.random() < 0.15:  # preempted
            yield from self._compute(one, kv, num_prompt)
            kv = yield from self._cached_or_loaded(one)
        if kv is None:
            return
        cached_end = len(kv)
        yield from self._compute(one, kv, num_prompt)
        one.output_token_ids = [kv[-1][0] % ALPHABET]
        for _ in range(self.rng.randint(0, 5)):
            yield from self._compute(one, kv, len(one.all_token_ids))
            one.output_token_ids.append(kv[-1][0] % ALPHABET)
        one.num_computed_tokens = len(kv)

        self.desk.wait_looked_up()
        complete = self.rng.random() < 0.9
        _, answer = self.desk.side.finished(one, self.desk.blocks_of(one), complete=complete)
        if one.kv_transfer_params is None:
            assert answer is None
            self._check_shared_cache(one, kv)
            return
        assert answer is not None
        self._check_answer(one, kv, cached_end, answer["kv_agent"])
        for job in self.desk.side.take_jobs().captures:
            assert complete
            self._check_capture(one, kv, job)
            self.unsettled.append(job)

    # -- what vLLM and the worker do ------------------------------------------------------------------

    def _cached_or_loaded(self, one: FakeRequest) -> Generator[None, None, list[Kv] | None]:
        """The KV to begin with; ``None`` if the request is aborted while it is loaded."""
        tokens = list(one.all_token_ids)
        while True:
            kv = self._local_hit(one.cache_salt, tokens)
            self._tell_residents()
            count = self.desk.ask(one.request_id, len(kv))
            self.desk.side.allocated(one.request_id, self.desk.blocks_of(one), count)
            if count == 0:
                return kv
            (job,) = self.desk.side.take_jobs().loads
            if job.at_once:  # nothing goes wrong with those, and the blocks are vLLM's to share from now on
                assert all(self.residents.get(load.key) == "" for load in job.chunks)
                for load in job.chunks:
                    self._put(kv, load)
                assert len(kv) < len(tokens)
                self._keep_blocks(one.cache_salt, tokens, kv)
                yield
                return kv
            yield
            if self.rng.random() < 0.05:
                self.desk.side.finished(one, job.block_ids, complete=False)
                self.desk.side.report(WorkerReport(loaded={one.request_id: None}))
                return None
            failure: LoadFailure | None = None
            for load in job.chunks:
                if self.rng.random() < 0.2:
                    failure = LoadFailure(key=load.key, start=load.start, reason="unreadable")
                    break
                self._put(kv, load)
            self.desk.side.report(WorkerReport(loaded={one.request_id: failure}))
            if failure is not None:
                if self.rng.random() < 0.5:
                    self.desk.catalog.quarantine(failure.key)
                del kv[failure.start // BLOCK * BLOCK :]
            self._keep_blocks(one.cache_salt, tokens, kv)
            yield
            if kv:  # else vLLM looks for cached tokens once more
                self.desk.side.allocated(one.request_id, self.desk.blocks_of(one), 0)
                return kv

    def _put(self, kv: list[Kv], load: ChunkLoad) -> None:
        record = self.desk.catalog.records[load.key]
        moved = [(h, position + load.delta) for h, position in self._as_stored(record)]
        assert load.start == len(kv)
        kv += moved[load.skip :]

    def _tell_residents(self) -> None:
        """Chunks come into memory and go; now and then it is other bytes that are there."""
        if self.rng.random() < 0.5:
            return
        keys = list(self.desk.catalog.records)
        some = self.rng.sample(keys, min(len(keys), 8))
        changes = {key: self.rng.choice(["", "", "", "other bytes", None]) for key in some}
        self.num_reports += 1
        residents = ResidentChanges(number=self.num_reports, checksums=changes)
        self.desk.side.report(WorkerReport(residents=residents))
        self.residents |= changes

    def _as_stored(self, record: ChunkRecord) -> list[Kv]:
        kv = self.stored[record.key]
        return list(kv) if record.is_lossless else [(hash((h, "rounded")), position) for h, position in kv]

    def _local_hit(self, salt: str | None, tokens: list[int]) -> list[Kv]:
        kv: list[Kv] = []
        while len(kv) + BLOCK < len(tokens):  # at least the last token is computed
            block = self.prefix_cache.get((salt, tuple(tokens[: len(kv) + BLOCK])))
            if block is None:
                break
            kv += block
        return kv

    def _keep_blocks(self, salt: str | None, tokens: list[int], kv: list[Kv]) -> None:
        for end in range(BLOCK, len(kv) + 1, BLOCK):
            self.prefix_cache.setdefault((salt, tuple(tokens[:end])), kv[end - BLOCK : end])

    def _compute(self, one: FakeRequest, kv: list[Kv], end: int) -> Generator[None]:
        tokens = list(one.all_token_ids)
        while len(kv) < end:
            for position in range(len(kv), min(len(kv) + 2 * BLOCK, end)):
                kv.append(computed(tokens[position], kv))
            self._keep_blocks(one.cache_salt, tokens, kv)
            yield

    # -- what must hold -----------------------------------------------------------------------------

    def _check_answer(self, one: FakeRequest, kv: list[Kv], cached_end: int, answer: dict) -> None:
        tokens = list(one.all_token_ids)
        counts = [answer[name] for name in ("exact", "adapted", "local", "computed")]
        assert sum(counts) == one.num_prompt_tokens
        assert min(counts) >= 0
        assert answer["computed"] == max(0, one.num_prompt_tokens - cached_end)
        moved = sum(not is_as_computed(tokens, kv, position) for position in range(one.num_prompt_tokens))
        assert moved <= answer["adapted"], "KV that was not computed in this place is not labelled adapted"
        assert answer["adapted"] == 0 or one.cache_salt is not None
        self._check_shared_cache(one, kv)

    def _check_shared_cache(self, one: FakeRequest, kv: list[Kv]) -> None:
        if one.cache_salt is None:
            tokens = list(one.all_token_ids)
            assert all(is_as_computed(tokens, kv, position) for position in range(len(kv))), (
                "moved chunks got into the shared prefix cache"
            )

    def _check_capture(self, one: FakeRequest, kv: list[Kv], job: CaptureJob) -> None:
        tokens = list(one.all_token_ids)
        for segment in job.segments:
            assert list(segment.token_ids) == tokens[segment.start : segment.end]
            values = tuple(kv[segment.start : segment.end])
            assert self.stored.setdefault(segment.key, values) == values, "one key names two different KV"
            if segment.parent == ROOT or segment.parent in self.plain:
                self.plain.add(segment.key)
                assert all(is_as_computed(tokens, kv, position) for position in range(segment.end)), (
                    "KV that saw moved chunks is stored as that of the plain text"
                )


@pytest.mark.parametrize("salt_per_plan", [True, False])
@pytest.mark.parametrize("first_seed", range(0, 240, 40))
def test_equal_keys_name_identical_kv_and_every_moved_token_is_labelled(
    salt_per_plan: bool, first_seed: int
) -> None:
    """With one salt per plan, as :class:`MemoryPrompt` chooses it, and with salts that plans share."""
    for seed in range(first_seed, first_seed + 40):
        engine = Engine(random.Random(seed), salt_per_plan)
        try:
            for _ in range(120):
                engine.step()
            engine.drain()
        finally:
            engine.desk.close()
