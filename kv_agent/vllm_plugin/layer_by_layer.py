"""Work that is due layer by layer, shared by whoever has time: readers ahead of the model, and its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from kv_agent.vllm_plugin.guard import attempt

# Few layers first, so that the model can begin; then more at once, for every piece of work costs a call.
_FIRST_LAYERS = (1, 1, 2, 2)
_LAYERS = 3

# Does layers from the first up to, but not with, the second.
LayerWork = Callable[[int, int], None]


class LayerByLayer:
    """Does all ``works`` for all layers. Thread-safe; nobody waits for more once something went wrong."""

    def __init__(self, works: Sequence[LayerWork], num_layers: int) -> None:
        groups = _groups(num_layers)
        self._pieces = [(group, work) for group in range(len(groups)) for work in works]
        self._groups = groups
        self._group_of = [group for group, (first, end) in enumerate(groups) for _ in range(first, end)]
        self._to_do = [len(works)] * len(groups)  # pieces of each group that are not done
        self._next = self._num_working = 0
        self._is_changed = threading.Condition()
        self.has_failed = False

    def help(self) -> None:
        """Do what nobody has begun, until there is nothing."""
        while self._do_next(len(self._groups) - 1):
            pass

    def wait(self, layer: int) -> None:
        """Return when this layer and all before it are done, or it has failed."""
        group = self._group_of[layer]
        while self._do_next(group):
            pass
        with self._is_changed:
            self._is_changed.wait_for(lambda: self.has_failed or not any(self._to_do[: group + 1]))

    def wait_for_all(self) -> None:
        """As :meth:`wait`, for all layers; nobody works any more when it returns."""
        self.wait(len(self._group_of) - 1)
        with self._is_changed:
            self._is_changed.wait_for(lambda: not self._num_working)

    def _do_next(self, last_group: int) -> bool:
        with self._is_changed:
            if self.has_failed or self._next == len(self._pieces):
                return False
            group, work = self._pieces[self._next]
            if group > last_group:
                return False
            self._next += 1
            self._num_working += 1
        is_done = attempt(partial(_done, work, *self._groups[group]), None) is not None
        with self._is_changed:
            self._num_working -= 1
            self._to_do[group] -= is_done
            self.has_failed = self.has_failed or not is_done
            self._is_changed.notify_all()
        return is_done


def _done(work: LayerWork, first_layer: int, end_layer: int) -> bool:
    work(first_layer, end_layer)
    return True


def _groups(num_layers: int) -> list[tuple[int, int]]:
    groups: list[tuple[int, int]] = []
    first = 0
    while first < num_layers:
        size = _FIRST_LAYERS[len(groups)] if len(groups) < len(_FIRST_LAYERS) else _LAYERS
        groups.append((first, min(first + size, num_layers)))
        first += size
    return groups
