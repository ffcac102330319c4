"""The last requests with memory that this server process answered: what each of them reused. No texts."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from kv_agent.chunks import Scope, TurnId

KEPT = 100  # requests of a namespace
_NAMESPACES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRequest:
    """A request that was answered at the Unix time ``at``, with the memories ``ids`` in its prompt.

    ``exact``, ``adapted``, ``local`` and ``computed`` are tokens of the prompt by where their KV came from.
    Finding the memories and placing them took ``recall_ms``; where that ``failed`` it was answered without.
    """

    at: float
    scope: Scope
    ids: tuple[TurnId, ...]
    exact: int
    adapted: int
    local: int
    computed: int
    recall_ms: float
    failed: bool


class RecentRequests:
    """The newest of each namespace, of the namespaces that asked last. Used on the event loop only."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[AnsweredRequest]] = OrderedDict()

    def note(self, request: AnsweredRequest) -> None:
        namespace = request.scope.namespace
        self._of.setdefault(namespace, deque(maxlen=KEPT)).append(request)
        self._of.move_to_end(namespace)
        if len(self._of) > _NAMESPACES:
            self._of.popitem(last=False)

    def newest(self, namespace: str, limit: int) -> list[AnsweredRequest]:
        """Up to ``limit`` requests of a namespace, newest first."""
        return list(reversed(self._of.get(namespace, ())))[:limit]
