"""The scheduler's half of the connector: decides what is loaded, probed and captured. Holds no tensors."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any

from kv_agent.chunks import ChunkKey, Fingerprint, Scope, root_key
from kv_agent.config import PluginConfig, RequestOptions, parse
from kv_agent.errors import ConfigError
from kv_agent.vllm_plugin.accounting import sources_of
from kv_agent.vllm_plugin.capturing import Capturing
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.jobs import LoadFailure, LoadJob, ProbeJob, ResidentChanges, StepJobs, WorkerReport
from kv_agent.vllm_plugin.pace import Pace
from kv_agent.vllm_plugin.plan import CheckedPlan, Refusal, Refused, refuse_all
from kv_agent.vllm_plugin.request_state import EngineRequest, RequestState
from kv_agent.vllm_plugin.resolver import Resolver
from kv_agent.vllm_plugin.salts import SaltLedger
from kv_agent.vllm_plugin.signing import signing_key, verified

PARAMS_KEY = "kv_agent"

# A catalog that answers nobody in this time is treated as not having the chunks.
RESOLVE_TIMEOUT_S = 5.0

# So long the only request waits for its look-up here: an idle step would take longer, and nobody else waits.
ALONE_WAIT_S = 0.003


class SchedulerSide:
    """Every decision of the plugin, as plain functions of requests and catalog answers."""

    def __init__(
        self,
        config: PluginConfig,
        fingerprint: Fingerprint,
        resolver: Resolver,
        *,
        block_tokens: int,
        prefix_caching: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._resolver = resolver
        self._block_tokens = block_tokens
        self._prefix_caching = prefix_caching
        self._signing_key = signing_key()
        self._pace = Pace(decides=config.load == "faster")
        self._states: dict[str, RequestState] = {}
        self._probing: set[str] = set()
        self._living: set[str] = set()  # requests in the engine, ours and others
        self._jobs = StepJobs()
        self._capturing = Capturing(fingerprint, config.chunk_tokens, clock)
        self._residents: dict[ChunkKey, str] = {}  # in the worker's memory as we have heard, with checksums
        self._heard = 0
        self._salts = SaltLedger()
        self.counters: Counter[str] = Counter()

    # -- a request's life ---------------------------------------------------------------------------

    def new_request(self, request: EngineRequest) -> None:
        self._living.add(request.request_id)
        raw = (request.kv_transfer_params or {}).get(PARAMS_KEY)
        if raw is not None and (raw := verified(raw, self._signing_key)) is None:
            self.counters["rejected_requests|unsigned"] += 1
        if raw is None:
            if request.cache_salt:
                self._salts.record(request.cache_salt, ())
            return
        error = None
        try:
            if not isinstance(raw, Mapping):
                raise ConfigError(f"kv_transfer_params.{PARAMS_KEY} must be an object")
            options = parse(RequestOptions, raw, f"kv_transfer_params.{PARAMS_KEY}")
        except ConfigError as err:
            self.counters["rejected_requests|malformed"] += 1
            options, error = RequestOptions(store=False), str(err)
        scope = options.scope.to_scope() if options.scope else Scope()
        root = root_key(self._fingerprint, scope.namespace, scope.user_id)
        state = RequestState(
            options=options,
            scope=scope,
            prompt=request.prompt_token_ids or [],
            salt=request.cache_salt or None,
            plan=CheckedPlan(root=root),
            error=error,
        )
        self._states[request.request_id] = state
        obstacle = self._obstacle(request)
        captures = options.scope is not None and options.store and obstacle is None
        if options.plan is not None and (reason := obstacle or self._no_injection(request, options)):
            self._refuse(state, refuse_all(options.plan, root, reason))
        elif options.plan is not None or captures:
            state.resolved = self._resolver.submit(state.prompt, scope, options.plan, find_stored=captures)
            state.resolve_deadline = time.monotonic() + RESOLVE_TIMEOUT_S
        if options.probe is not None and obstacle is None:
            self._probing.add(request.request_id)

    def match(self, request_id: str, num_computed: int) -> tuple[int | None, bool]:
        """How many tokens behind the first ``num_computed`` will be loaded; ``None``: ask again.

        Called again and again by vLLM, so asking changes nothing but the note of the last answer.
        """
        state = self._states.get(request_id)
        if state is None:
            return 0, False
        state.asked, state.local = True, num_computed
        if state.options.plan is None:
            return 0, False
        if state.resolved is not None and len(self._living) == 1:
            wait([state.resolved], ALONE_WAIT_S)
        if not self._settle(state):
            return None, False
        count = max(0, state.plan.reach(num_computed) - num_computed)
        if not count:
            return 0, False
        state.at_once = self._can_load_at_once(state, num_computed, num_computed + count)
        if state.pays is None:
            state.pays = self._pace.pays(count, at_once=state.at_once)
        return (count, not state.at_once) if state.pays else (0, False)

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external: int) -> None:
        """vLLM admits the request and has reserved blocks for the ``num_external`` tokens of ``match``.

        It tells once more when a load has ended; only the call that follows a look-up counts.
        """
        state = self._states.get(request_id)
        if state is None or not state.asked:
            return
        state.asked = False
        state.cached_end = end = state.local + num_external
        state.trusted = self._agrees(state)
        if num_external:
            loads = state.plan.loads(state.local, end)
            job = LoadJob(
                request_id=request_id,
                block_ids=tuple(block_ids),
                chunks=loads,
                records={} if state.at_once else state.plan.records(loads),
                at_once=state.at_once,
            )
            self._jobs.loads.append(job)
        if num_external and not state.at_once:
            self._pace.begin_load(request_id, num_external)
        else:
            self._record_moves(state)

    def probe_request_ids(self) -> frozenset[str]:
        """Requests whose prefill has still to be probed."""
        return frozenset(self._probing)

    def prompt_tokens(self, request_id: str) -> int:
        return len(self._states[request_id].prompt)

    def prefill_done(self, request_id: str, block_ids: Sequence[int]) -> None:
        """This step computes the last prompt token of a probing request."""
        state = self._states[request_id]
        self._probing.discard(request_id)
        probe = state.options.probe
        assert probe is not None
        end = min(probe.end or len(state.prompt), len(state.prompt))
        if probe.start >= end:
            state.error = f"probe: start {probe.start} is not before end {end}"
            return
        self._jobs.probes.append(
            ProbeJob(request_id=request_id, block_ids=tuple(block_ids), start=probe.start, end=end)
        )

    def take_jobs(self, num_tokens: int = 0) -> StepJobs:
        """What the worker is to do in a step that computes so many tokens."""
        jobs, self._jobs = self._jobs, StepJobs()
        jobs.num_tokens = num_tokens if self._pace.decides else 0
        jobs.heard = self._heard
        return jobs

    def report(self, report: WorkerReport) -> None:
        if report.residents is not None:
            self._note_residents(report.residents)
        for step in report.steps:
            self._pace.computed(step)
        for request_id, failure in report.loaded.items():
            self._pace.end_load(request_id, is_whole=failure is None)
            state = self._states.get(request_id)
            if state is not None:
                if failure is not None:
                    self._load_failed(state, failure)
                self._record_moves(state)
        for request_id, vector in report.probes.items():
            if request_id in self._states:
                self._states[request_id].probe = vector
        for turn_id, trouble in report.settled.items():
            self._capturing.settled(turn_id)
            self.counters[f"turns|{'stored' if trouble is None else 'lost'}"] += 1

    def finished(
        self, request: EngineRequest, block_ids: Sequence[int], *, complete: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request ended: answer what was reused, and capture its new tokens if it is ``complete``.

        Returns whether its blocks must stay until the worker has copied them, and the answer's fields.
        """
        self._living.discard(request.request_id)
        self._probing.discard(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return False, None
        self._settle(state)
        answer = self._reuse(state, request.num_prompt_tokens)
        may_store = complete and state.error is None and self._obstacle(request) is None
        job = self._capturing.job(state, request, block_ids) if may_store else None
        if job is not None:
            self._jobs.captures.append(job)
            answer["turn_id"] = job.turn_id
        return job is not None and bool(job.segments), {PARAMS_KEY: answer}

    # -- decisions ----------------------------------------------------------------------------------

    def _obstacle(self, request: EngineRequest) -> Refusal | None:
        """What keeps this request's KV from being named by its token ids alone."""
        if request.lora_request is not None:
            return Refusal.LORA
        if request.mm_features or request.prompt_token_ids is None or request.prompt_embeds is not None:
            return Refusal.MULTIMODAL
        return None

    def _no_injection(self, request: EngineRequest, options: RequestOptions) -> Refusal | None:
        if options.scope is None:
            return Refusal.NO_SCOPE
        if self._prefix_caching and not request.cache_salt:
            return Refusal.NO_SALT
        return None

    def _can_load_at_once(self, state: RequestState, start: int, end: int) -> bool:
        """Whether all of it is in memory, so that the step which computes the rest can begin."""
        loads = state.plan.loads(start, end)
        return all(self._residents.get(load.key) == load.checksum for load in loads)

    def _note_residents(self, changes: ResidentChanges) -> None:
        self._heard = changes.number
        for key, checksum in changes.checksums.items():
            if checksum is None:
                self._residents.pop(key, None)
            else:
                self._residents[key] = checksum

    def _settle(self, state: RequestState) -> bool:
        """Take the look-up's result if it is there; ``False`` while it is worth waiting for."""
        if state.resolved is None:
            return True
        if not state.resolved.done():
            if time.monotonic() < max(state.resolve_deadline, self._resolver.moved_on + RESOLVE_TIMEOUT_S):
                return False
            state.resolved = None
            if state.options.plan is not None:
                self._refuse(state, refuse_all(state.options.plan, state.plan.root, Refusal.LATE))
            return True
        resolved = attempt(state.resolved.result, None)
        if resolved is not None:
            state.known = resolved.known
            self._refuse(state, resolved.plan)
        elif state.options.plan is not None:
            self._refuse(state, refuse_all(state.options.plan, state.plan.root, Refusal.LOOKUP))
        state.resolved = None
        return True

    def _refuse(self, state: RequestState, plan: CheckedPlan) -> None:
        state.plan = plan
        for refused in plan.refused:
            self.counters[f"refused_chunks|{refused.reason}"] += 1

    def _load_failed(self, state: RequestState, failure: LoadFailure) -> None:
        self.counters[f"load_failures|{failure.reason}"] += 1
        # vLLM keeps whole valid blocks and asks again only when not even one is left.
        state.cached_end = failure.start - failure.start % self._block_tokens
        state.plan = state.plan.without(failure.key, failure.start, failure.reason)
        # A moved chunk may have begun in the local hit; the plan no longer tells of it.
        state.trusted = state.trusted and self._agrees(state)
        self._capturing.lost([failure.key])
        state.known.discard([failure.key])  # so that what is computed now is stored again

    def _agrees(self, state: RequestState) -> bool:
        return self._salts.agrees(state.salt, state.plan.moves(state.local), state.local)

    def _record_moves(self, state: RequestState) -> None:
        """Before vLLM can cache the request's blocks: note what they will hold."""
        if state.salt is not None:
            self._salts.record(state.salt, state.plan.moves(state.cached_end))

    def _reuse(self, state: RequestState, num_prompt_tokens: int) -> dict[str, Any]:
        """Tokens of the prompt by where their KV came from, and what was refused."""
        sources = sources_of(
            state.plan,
            num_prompt_tokens,
            state.cached_end,
            trusted=state.trusted,
            reason=Refusal.FASTER if state.pays is False else Refusal.GAP,
        )
        exact, adapted = sources.exact, sources.adapted
        for source, count in sources.tokens.items():
            self.counters[f"tokens|{source}"] += count
        self.counters["saved_tokens|exact"] += exact
        self.counters["saved_tokens|adapted"] += adapted
        self.counters[f"hits|{'adapted' if adapted else 'exact' if exact else 'none'}"] += 1
        answer: dict[str, Any] = {
            **sources.tokens,
            "chunk_ids": [chunk.record.key for chunk in sources.used],
            "refused": [_as_dict(r) for r in (*state.plan.refused, *sources.unreached)],
            "fingerprint": self._fingerprint,
        }
        if state.error is not None:
            answer["error"] = state.error
        if state.probe is not None:
            answer["probe"] = base64.b64encode(state.probe).decode()
        return answer


def _as_dict(refused: Refused) -> dict[str, str]:
    return {"chunk_id": refused.chunk_id, "reason": str(refused.reason)}
