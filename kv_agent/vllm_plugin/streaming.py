"""Moved KV into a GPU's paged cache on a stream of its own: the model computes on while it is copied.

It has not been run on a GPU yet; on a CPU, whose streams do nothing, it is tested with all else. So it is
tried when an engine starts, and where it does not leave what the attention backend would, the engine's own
thread and stream copy.
"""

# L layers, T tokens, H kv heads, D head dim
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kv_agent.kv.block_copy import Piece
from kv_agent.kv.rope import RotaryScheme
from kv_agent.vllm_plugin.direct import ChunkWriter, DirectWriter, Prepare
from kv_agent.vllm_plugin.guard import attempt
from kv_agent.vllm_plugin.layer_by_layer import LayerWork
from kv_agent.vllm_plugin.paged_cache import PagedCache
from kv_agent.vllm_plugin.staging import Staging

logger = logging.getLogger(__name__)


class StreamWriter:
    """Through pinned memory to the device, turned there, and given to the attention backend's writer.

    Whatever thread does that waits until it is done, so nobody else has to know of streams: the blocks of a
    request that is given up are free when its threads are.
    """

    def __init__(self, cache: PagedCache, scheme: RotaryScheme | None) -> None:
        self._cache = cache
        self._scheme = scheme
        self._device: Any = torch.get_device_module(cache.device)
        self._stream = self._device.Stream()

    def into(self, block_ids: Sequence[int]) -> Prepare:
        """See :class:`ChunkWriter`."""
        # What was launched so far may still read the blocks for whoever had them before.
        are_free = self._device.Event()
        are_free.record(self._device.current_stream())
        return partial(self._prepared, tuple(block_ids), are_free)

    def _prepared(self, block_ids: tuple[int, ...], are_free: Any, pieces: Iterable[Piece]) -> LayerWork:
        return partial(self._write, block_ids, are_free, [self._reachable(piece) for piece in pieces])

    def _reachable(self, piece: Piece) -> Piece:
        """The same from where the device can fetch it by itself."""
        if piece.kv_L2THD.device == self._cache.device:
            return piece
        return piece._replace(kv_L2THD=piece.kv_L2THD.pin_memory())  # itself if it is pinned

    def _write(
        self, block_ids: Sequence[int], are_free: Any, pieces: Sequence[Piece], first: int, end: int
    ) -> None:
        staging = Staging(self._cache, self._scheme, layers=slice(first, end))
        with torch.inference_mode(), self._device.stream(self._stream):
            self._stream.wait_event(are_free)
            try:
                staging.write(pieces, block_ids)
            finally:  # an error must not leave copies behind that are still to come
                is_written = self._device.Event()
                is_written.record(self._stream)
                is_written.synchronize()


def chunk_writer(cache: PagedCache, scheme: RotaryScheme | None) -> ChunkWriter | None:
    """What writes into this cache beside the engine's thread, or ``None`` where nothing does."""
    if cache.copier is not None:
        return DirectWriter(cache.copier, scheme)
    if not cache.has_streams:
        return None
    writer = StreamWriter(cache, scheme)

    def put(kv_L2THD: Tensor, block_ids: Sequence[int], start: int) -> None:
        writer.into(block_ids)([Piece(kv_L2THD, start)])(0, cache.num_layers)

    if attempt(partial(cache.puts_alike, put), False, "streams are left alone"):
        return writer
    logger.warning(
        "chunks are copied by the engine's thread: a stream of their own does not work on %s",
        cache.device,
        extra={"event": "stream_unavailable"},
    )
    return None
