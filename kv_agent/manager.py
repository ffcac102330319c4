"""``CacheManager``: one engine, one store and one index, shared by all memories of a process."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

from kv_agent.chunks import ChunkKey, ChunkRecord, Fingerprint, Scope, TurnId, root_key
from kv_agent.config import PluginConfig, default_store_dir
from kv_agent.engines.base import Call, Completion, Engine
from kv_agent.errors import ConfigError, KVAgentError, StorageError
from kv_agent.pending import PendingTurns
from kv_agent.placing import Placer, Quality
from kv_agent.planning import MemoryPrompt
from kv_agent.prompting import ChatPrompts
from kv_agent.retrieval.engine import RetrievalEngine
from kv_agent.retrieval.texts import TextEmbedder, TextFeed, embedded
from kv_agent.searching import Library, TextVoice
from kv_agent.storage.policy import Policy
from kv_agent.storage.store import LocalStore

logger = logging.getLogger(__name__)

Backend = Literal["auto", "gpu", "cpu"]

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "recall"

# GPU memory for hot chunks when the backend is a GPU; settings={"device_bytes": ...} overrides it.
DEVICE_BYTES = 1 << 30

DURABLE_TIMEOUT_S = 60.0


class CacheManager:
    """Opens the engine with the plugin, the store and the index; close it, or use it in a ``with``.

    ``engine`` is ``"vllm"`` or an object with the :class:`~kv_agent.engines.base.Engine` methods that
    captures into the same ``store``. ``backend`` says where hot KV is kept: ``"gpu"`` in GPU memory,
    ``"cpu"`` in host memory. ``embedder`` (a ``SentenceTransformer``, say) gives hybrid searches a third
    voice; what it computed is kept on disk if it has a ``name`` attribute. Further keywords go to
    ``vllm.LLM``; ``settings`` are the plugin's own (``chunk_tokens``, ``host_bytes``, ...). ``policy`` says
    who goes first when limits are exceeded, unless a namespace names its own: a name, or an object with a
    method ``rank`` (:class:`~kv_agent.storage.policy.Policy`), which is asked in this process.
    """

    def __init__(
        self,
        engine: Literal["vllm"] | Engine = "vllm",
        *,
        model: str | Path | None = None,
        store: str | Path | None = None,
        backend: Backend = "auto",
        settings: Mapping[str, Any] | None = None,
        embedder: TextEmbedder | None = None,
        policy: str | Policy | None = None,
        **engine_options: Any,
    ) -> None:
        if isinstance(engine, str) and engine != "vllm":
            raise ConfigError(f'engine must be "vllm" or an engine object, got {engine!r}')
        self._attached: set[tuple[str, str]] = set()
        self._closed = False
        self._uses = ThreadPoolExecutor(1, thread_name_prefix="kv-agent-uses")
        self._use_is_lost = False
        root = Path(store).expanduser() if store is not None else default_store_dir()
        device_bytes = DEVICE_BYTES if _resolve_backend(backend) == "gpu" else 0
        self._makes_room = policy is not None and not isinstance(policy, str)
        self._store = LocalStore(
            root,
            host_bytes=0,
            policy=None if isinstance(policy, str) else policy,
            disk_bytes=(settings or {}).get("disk_bytes"),
        )
        if self._makes_room:
            settings = {"make_room": False, **(settings or {})}
        elif policy is not None:
            settings = {"policy": policy, **(settings or {})}
        try:
            self._engine = (
                _start_vllm(model, root, {"device_bytes": device_bytes, **(settings or {})}, engine_options)
                if isinstance(engine, str)
                else engine
            )
        except BaseException:
            self._store.close()
            raise
        self._pending = PendingTurns(self._store.catalog.ledger.settled, self._make_room)
        self._index = RetrievalEngine(self._store.catalog, self._engine.fingerprint, root / "index")
        self._texts = None if embedder is None else self._text_voice(embedder, root / "index")
        self.prompts = ChatPrompts(self._engine.tokenizer)
        self._placer = Placer(
            catalog=self._store.catalog,
            fingerprint=self._engine.fingerprint,
            chunk_tokens=int((settings or {}).get("chunk_tokens", PluginConfig().chunk_tokens)),
            prompts=self.prompts,
            run=self._run_durably,
        )

    # -- what users call ----------------------------------------------------------------------------

    def store_kv(
        self,
        prompt: str,
        response: str = "",
        *,
        scope: Scope | None = None,
        system_prompt: str | None = None,
        metadata: Mapping[str, str | int | float | bool] | None = None,
        ttl_s: float | None = None,
    ) -> TurnId | None:
        """Compute a turn once and keep its KV as a memory; ``None`` if it could not be captured.

        It is forgotten after ``ttl_s`` seconds, if that is given.

        Without ``scope`` it belongs to the one user whose :class:`AgentMemory` is open on this manager,
        or to the default user when there is none.
        """
        if ttl_s is not None and not 0 < ttl_s < math.inf:
            raise ConfigError(f"ttl_s must be a positive number of seconds, got {ttl_s}")
        scope = scope or self._only_scope()
        before = self.prompts.prefix(system_prompt)
        self.ensure_prefix(scope, before)
        # The first tokens of a sequence draw attention whatever they are; a memory must not bring that along.
        # Where all turns open alike its opening is replaced when it is put back, see :class:`Placer`.
        if not before and not self.prompts.opening:
            before = self.prompts.neutral
        token_ids = before + self.prompts.turn(prompt, response)
        self.check_length(len(token_ids) + 1, "the turn")
        call = Call(
            token_ids=token_ids,
            max_tokens=1,
            options={
                "scope": scope.to_dict(),
                "content_start": len(before),
                "metadata": dict(metadata or {}),
                "ttl_s": ttl_s,
            },
        )
        return self.run(call).turn_id

    def wait_durable(self, timeout_s: float = DURABLE_TIMEOUT_S) -> bool:
        """Wait until every turn captured through this manager is on disk and can be found."""
        return self._pending.wait(timeout_s)

    def _make_room(self, settled: Iterable[TurnId]) -> None:
        """As storing them does elsewhere; of turns that came together the newest stays in any case."""
        if not self._makes_room:
            return
        turns = self._store.catalog.turns(settled).items()
        for asked, turn in sorted(turns, key=lambda item: item[1].created, reverse=True):
            self._store.make_room(turn.scope, turn.turn_id, is_new=asked == turn.turn_id)

    def catch_up(self) -> None:
        """Wait for what was captured, and let go of memories whose time is over."""
        self.wait_durable()
        self._store.forget_expired(time.time())

    def stats(self) -> dict[str, int]:
        """Numbers of turns, chunks, tokens and bytes in the store, all users together."""
        return self._store.stats()

    def close(self) -> None:
        """Wait until what was captured is durable, then stop the engine. Calling it again is harmless."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait_durable()
            self._index.close()
            if self._texts is not None:
                self._texts.index.close()
        finally:
            self._engine.close()
            self._uses.shutdown()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what AgentMemory builds on -----------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint:
        return self._engine.fingerprint

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def store(self) -> LocalStore:
        return self._store

    @property
    def index(self) -> RetrievalEngine:
        return self._index

    @property
    def library(self) -> Library:
        """Where memories of this manager's model are searched."""
        return Library(
            catalog=self._store.catalog, index=self._index, fingerprint=self.fingerprint, texts=self._texts
        )

    def note_use(self, turn_ids: Iterable[TurnId] = (), *, holding: Iterable[ChunkKey] = ()) -> None:
        """Count a use of these turns and of those with these chunks, for the policies, in the background."""
        ids, keys, now = tuple(turn_ids), tuple(holding), time.time()
        if ids or keys:
            self._uses.submit(self._touch, ids, keys, now)

    def _touch(self, turn_ids: Sequence[TurnId], keys: Sequence[ChunkKey], now: float) -> None:
        ledger = self._store.catalog.ledger
        try:
            ledger.touch({*turn_ids, *ledger.turns_with(keys)}, now)
        except StorageError as err:
            if not self._use_is_lost:
                about = {"event": "store_trouble"}
                logger.warning("uses of memories are not counted while this lasts: %s", err, extra=about)
            self._use_is_lost = True

    def attach(self, scope: Scope) -> None:
        """Note that a memory of this user is open; see :meth:`store_kv`."""
        if len(self._attached) < 2:  # more than one is all that matters
            self._attached.add((scope.namespace, scope.user_id))

    def expect(self, turn_id: TurnId) -> None:
        """Note a turn that was captured from a request of others, for :meth:`wait_durable`."""
        self._pending.add(turn_id)

    def run(self, call: Call) -> Completion:
        """Run one call and remember what it captured, for :meth:`wait_durable`."""
        if self._closed:
            raise KVAgentError("this CacheManager is closed; open a new one")
        (completion,) = self._engine.run([call])
        if completion.turn_id is not None:
            self.expect(completion.turn_id)
        return completion

    def prefix_records(self, scope: Scope, prefix: tuple[int, ...]) -> list[ChunkRecord]:
        """The stored chunks that make up a prompt's prefix; none unless all of it is stored."""
        root = root_key(self.fingerprint, scope.namespace, scope.user_id)
        return self._placer.chain(root, prefix, 0)

    def ensure_prefix(self, scope: Scope, prefix: tuple[int, ...]) -> None:
        """Store the prefix as chunks of its own, so that memories can be placed right behind it."""
        self._ensure_context(scope, prefix, "the system prompt")

    def ensure_opening(self, scope: Scope) -> None:
        """Store what replaces the opening of memories that began a sequence."""
        if self.prompts.opening and not self.prompts.prefix():
            self._ensure_context(scope, self.prompts.neutral, "a neutral turn")  # so that chunks end there
            self._ensure_context(scope, self.prompts.neutral + self.prompts.opening, "a neutral turn")

    def _ensure_context(self, scope: Scope, token_ids: tuple[int, ...], what: str) -> None:
        root = root_key(self.fingerprint, scope.namespace, scope.user_id)
        if not token_ids or self._placer.chain(root, token_ids, 0):
            return
        self.check_length(len(token_ids) + 1, what)
        options = {"scope": scope.to_dict(), "content_start": len(token_ids)}
        self.run(Call(token_ids=token_ids, max_tokens=1, options=options))
        self.wait_durable()

    def placed(self, prompt: MemoryPrompt, scope: Scope, reading: Scope, quality: Quality) -> MemoryPrompt:
        """The prompt as it is put back, see :class:`~kv_agent.placing.Placer`."""
        return self._placer.placed(prompt, scope, reading, quality)

    def _run_durably(self, call: Call) -> None:
        self.run(call)
        self.wait_durable()

    def chunk_records(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkRecord]:
        return self._store.catalog.chunks(keys)

    def check_length(self, num_tokens: int, what: str) -> None:
        """Raise unless ``num_tokens`` fit the model's context."""
        if num_tokens > self.max_model_len:
            raise ConfigError(
                f"{what} needs {num_tokens} tokens, the model takes {self.max_model_len}; make it shorter"
            )

    def _text_voice(self, embedder: TextEmbedder, folder: Path) -> TextVoice:
        feed = TextFeed(self._store.catalog, embedder)
        name = getattr(embedder, "name", None)  # vectors of another embedder must not be taken for its own
        snapshots = folder / f"texts-{quote(name, safe='')}" if isinstance(name, str) and name else None
        return TextVoice(
            index=RetrievalEngine(feed, self.fingerprint, snapshots),
            embed=lambda query: embedded(embedder, [query])[0],
        )

    def _only_scope(self) -> Scope:
        if len(self._attached) > 1:
            raise ConfigError(
                "memories of several users are open; say whose this is: store_kv(..., scope=Scope(...))"
            )
        for namespace, user_id in self._attached:
            return Scope(namespace=namespace, user_id=user_id)
        return Scope()


def _resolve_backend(backend: Backend) -> Literal["gpu", "cpu"]:
    import torch

    if backend not in ("auto", "gpu", "cpu"):
        raise ConfigError(f'backend must be "auto", "gpu" or "cpu", got {backend!r}')
    if backend == "gpu" and not torch.cuda.is_available():
        raise ConfigError('backend="gpu" needs a CUDA GPU and none is available; use backend="cpu" or "auto"')
    return "gpu" if torch.cuda.is_available() and backend != "cpu" else "cpu"


def _start_vllm(
    model: str | Path | None, root: Path, settings: dict[str, Any], options: dict[str, Any]
) -> Engine:
    from kv_agent.engines.vllm_local import VllmEngine

    if model is None and not BUNDLED_MODEL.is_dir():
        raise ConfigError("no model given and the bundled one is not installed; pass model=NAME_OR_FOLDER")
    return VllmEngine(model or BUNDLED_MODEL, {"store": str(root.resolve()), **settings}, **options)
