"""``KVAgentConnector``: vLLM's connector interface, delegating to the scheduler and worker halves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.model_executor.layers import rotary_embedding
from vllm.v1.request import RequestStatus

from kv_agent.config import PluginConfig, parse
from kv_agent.errors import ConfigError, UnsupportedModelError
from kv_agent.kv.rope import RotaryScheme, scheme_from_table
from kv_agent.machine import available_bytes, leave_out_of_collections, memory_budgets
from kv_agent.storage.codecs import Codec
from kv_agent.storage.policy import policy_named
from kv_agent.storage.store import LocalStore
from kv_agent.vllm_plugin.fingerprint import fingerprint_details, fingerprint_of
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.jobs import StepJobs, WorkerReport
from kv_agent.vllm_plugin.metrics import KVAgentPromMetrics, KVAgentStats
from kv_agent.vllm_plugin.paged_cache import PagedCache, PagedLayer
from kv_agent.vllm_plugin.plan import Limits
from kv_agent.vllm_plugin.resolver import Resolver
from kv_agent.vllm_plugin.scheduler import SchedulerSide
from kv_agent.vllm_plugin.support import (
    check_connector_config,
    check_rope_modules,
    check_supported,
    trained_window,
)
from kv_agent.vllm_plugin.tally import Tally
from kv_agent.vllm_plugin.text import TurnDecoder
from kv_agent.vllm_plugin.worker import WorkerSide

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class KVAgentMetadata(KVConnectorMetadata):
    """The scheduler's jobs for one step."""

    def __init__(self, jobs: StepJobs) -> None:
        self.jobs = jobs


class KVAgentWorkerMetadata(KVConnectorWorkerMetadata):
    """The worker's report of one step."""

    def __init__(self, report: WorkerReport) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, KVAgentWorkerMetadata)
        self.report.merge(other.report)
        return self


@dataclass
class _Handshake(KVConnectorHandshakeMetadata):
    """What a worker found out about its model."""

    can_move: bool


class KVAgentConnector(KVConnectorBase_V1):
    """Captures turns, answers probes and injects stored chunks on stock vLLM."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        raw = check_connector_config(vllm_config.kv_transfer_config)
        self._config = parse(PluginConfig, raw, "kv_connector_extra_config.kv_agent")
        check_supported(vllm_config, kv_cache_config)
        # vLLM's default fails a request whose KV cannot be loaded; ours must be computed instead.
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        self._block_tokens = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._layer_numbers: dict[str, int] = {}
        self._tally = Tally()
        if role is KVConnectorRole.SCHEDULER:
            self._start_scheduler()

    def _start_scheduler(self) -> None:
        details = fingerprint_details(self._vllm_config)
        fingerprint = fingerprint_of(details)
        self._store = LocalStore(self._config.store, host_bytes=0)
        catalog = self._store.catalog
        pooled = list(self._pooled_layers(details["layers"]))
        catalog.register_fingerprint(fingerprint, details | {"pooled_layers": pooled})
        known = (catalog.fingerprint_details(fingerprint) or {}).get("pooled_layers")
        if known != pooled:
            raise ConfigError(
                f"this store's memories of this model are found by the keys of layers {known}, not {pooled}; "
                f"set pooled_layers to {known} or use another store"
            )
        self._resolver = Resolver(self._store.catalog, fingerprint)
        self._scheduler = SchedulerSide(
            self._config,
            fingerprint,
            self._resolver,
            block_tokens=self._block_tokens,
            prefix_caching=bool(self._vllm_config.cache_config.enable_prefix_caching),
        )
        about = {"event": "started", "store": str(self._config.store), "fingerprint": fingerprint}
        logger.info("kv_agent: store %s, model fingerprint %s", self._config.store, fingerprint, extra=about)

    @property
    def requires_kv_delivery(self) -> bool:
        """A capture that a preemption makes impossible is only a missed memory."""
        return False

    # -- scheduler role -----------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Until the workers have said that they can move keys, none are moved."""
        if metadata and all(isinstance(one, _Handshake) and one.can_move for one in metadata.values()):
            self._resolver.limits = Limits(window=trained_window(self._vllm_config.model_config))

    def on_new_request(self, request: Request) -> None:
        attempt(partial(self._deciding.new_request, request), None)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._deciding.match(request.request_id, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        block_ids = blocks.get_block_ids()[0] if num_external_tokens else ()
        self._deciding.allocated(request.request_id, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if probing := self._deciding.probe_request_ids():
            for request_id, block_ids in _finishing_prefills(scheduler_output, probing, self._deciding):
                self._deciding.prefill_done(request_id, block_ids)
        return KVAgentMetadata(self._deciding.take_jobs(scheduler_output.total_num_scheduled_tokens))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if (meta := connector_output.kv_connector_worker_meta) is not None:
            assert isinstance(meta, KVAgentWorkerMetadata)
            self._deciding.report(meta.report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        complete = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        decided = attempt(partial(self._deciding.finished, request, block_ids, complete=complete), None)
        return decided or (False, None)

    # -- statistics, of either role ------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        counters: Mapping[str, float] = {}
        if self._scheduler is not None:
            counters = self._scheduler.counters
        elif self._worker is not None:
            counters = self._worker.counters()
        data = attempt(partial(self._tally.take, counters), None)
        return KVAgentStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KVAgentStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return KVAgentPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker role --------------------------------------------------------------------------------

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return _Handshake(can_move=self._moving.can_move)

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        with set_current_vllm_config(self._vllm_config):
            scheme = _model_rope()
        layers = self._vllm_config.compilation_config.static_forward_context
        cache = PagedCache([_paged_layer(layers[name]) for name in kv_caches], self._block_tokens)
        self._layer_numbers = {name: number for number, name in enumerate(kv_caches)}
        budgets = memory_budgets(available_bytes(), self._config.host_bytes, self._config.warm_bytes)
        self._worker = WorkerSide(
            cache,
            LocalStore(
                self._config.store,
                host_bytes=budgets.host_bytes,
                warm_bytes=budgets.warm_bytes,
                device_bytes=self._config.device_bytes,
                device=cache.device,
                promote_after=self._config.promote_after,
                codec=Codec(
                    name=self._config.codec,
                    scheme=scheme,
                    device=cache.device if cache.has_streams else None,
                ),
                fsync=self._config.fsync,
                policy=policy_named(self._config.policy),
                disk_bytes=self._config.disk_bytes,
                makes_room=self._config.make_room,
            ),
            scheme,
            pooled_layers=self._pooled_layers(cache.num_layers),
            queue_bytes=self._config.queue_bytes,
            load_threads=self._config.load_threads,
            decode=TurnDecoder(self._vllm_config.model_config),
        )
        self._tally = Tally(self._worker.gauges)
        leave_out_of_collections()

    def _pooled_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers to pool, in order; negative ones count from the last, absent ones are left out."""
        wanted = self._config.pooled_layers
        layers = tuple(sorted({i % num_layers for i in wanted if -num_layers <= i < num_layers}))
        if not layers:
            raise ConfigError(f"pooled_layers {list(wanted)} are all beyond the model's {num_layers} layers")
        return layers

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Every step begins with this, while :meth:`start_load_kv` may come behind its forward pass."""
        super().bind_connector_metadata(connector_metadata)
        self._moving.begin(self._jobs)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._moving.start(idle=forward_context.attn_metadata is None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._moving.wait_for_layer(self._layer_numbers[layer_name])

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        return None

    def wait_for_save(self) -> None:
        self._moving.save(self._jobs)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._moving.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._moving.take_invalid_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._moving.take_report()
        return KVAgentWorkerMetadata(report) if report else None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._scheduler is not None:
            self._resolver.close()
            self._store.close()
            self._scheduler = None

    @property
    def _deciding(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _moving(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    @property
    def _jobs(self) -> StepJobs:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KVAgentMetadata)
        return metadata.jobs


def _finishing_prefills(
    output: SchedulerOutput, probing: frozenset[str], deciding: SchedulerSide
) -> list[tuple[str, list[int]]]:
    """Probing requests whose last prompt token is computed in this step, with their block ids."""
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    state = output.kv_connector_block_state
    done = []
    for request_id in probing.intersection(computed):
        end = computed[request_id] + output.num_scheduled_tokens[request_id]
        block_ids = state.get_block_ids(request_id) if state is not None else None
        if end >= deciding.prompt_tokens(request_id) and block_ids is not None:
            done.append((request_id, block_ids[0]))
    return done


def _paged_layer(layer: Any) -> PagedLayer:
    def write(key_THD: Tensor, value_THD: Tensor, slots_T: Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, key_THD, value_THD, layer.kv_cache, slots_T)

    return PagedLayer(
        kv_cache_BHNC=layer.kv_cache,
        write=write,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_size,
    )


def _model_rope() -> RotaryScheme | None:
    """The scheme of the rotary embedding that the loaded model really uses, from vLLM's own table.

    ``None`` where keys cannot be moved by it.
    """
    try:
        module = check_rope_modules(list(rotary_embedding._ROPE_DICT.values()))
        with torch.device("cpu"):
            table = module._compute_cos_sin_cache()
        return scheme_from_table(table.float().cpu(), neox=bool(module.is_neox_style))
    except UnsupportedModelError as err:
        logger.warning(
            "memories are reused only where they were computed and found by words: %s",
            err,
            extra={"event": "reuse_limited"},
        )
        return None
