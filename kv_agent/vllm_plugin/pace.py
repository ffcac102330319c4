"""Whether putting KV back is faster than computing it: from how long both took lately in this engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kv_agent.vllm_plugin.jobs import StepTime

# What was measured longer ago, or before so many others, tells nothing about now.
_AGE_S = 600.0
_KEPT = 64

# Of fewer there is nothing to be learnt: until then KV is put back.
_FEWEST = 4

# Steps of fewer tokens take as long as a step at least takes, whatever they compute.
_SMALL_STEP = 16

# A load of fewer tokens takes as long as a load at least takes.
_LONG_LOAD = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """So many tokens took so many seconds, which was noticed ``at`` a monotonic time."""

    num_tokens: int
    seconds: float
    at: float
    num_put_back: int = 0  # beside computing


class Pace:
    """Learns from steps and loads. Not thread-safe; used where requests are scheduled.

    One that ``decides`` nothing puts everything back.
    """

    def __init__(self, *, decides: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.decides = decides
        self._clock = clock
        self._small: deque[Took] = deque(maxlen=_KEPT)
        self._large: deque[Took] = deque(maxlen=_KEPT)
        self._loads: deque[Took] = deque(maxlen=_KEPT)
        self._mixed: deque[Took] = deque(maxlen=_KEPT)
        self._loading: dict[str, tuple[int, float]] = {}

    def computed(self, step: StepTime) -> None:
        """A step was made; its tokens are of all its requests together."""
        took = Took(num_tokens=step.num_tokens, seconds=step.seconds, at=self._clock())
        if step.num_put_back:
            self._mixed.append(replace(took, num_put_back=step.num_put_back))
        else:
            (self._small if step.num_tokens < _SMALL_STEP else self._large).append(took)

    def begin_load(self, request_id: str, num_tokens: int) -> None:
        """A request was let in, and waits for so many tokens of KV."""
        self._loading[request_id] = (num_tokens, self._clock())

    def end_load(self, request_id: str, *, is_whole: bool) -> None:
        """It waits no longer; what was not put back as a whole is no measure."""
        num_tokens, began = self._loading.pop(request_id, (0, 0.0))
        if is_whole and num_tokens:
            now = self._clock()
            self._loads.append(Took(num_tokens=num_tokens, seconds=now - began, at=now))

    def pays(self, num_tokens: int, *, at_once: bool = False) -> bool:
        """Whether to put so many tokens back, before or ``at_once`` in the step that computes the rest.

        Where too little is known, it does.
        """
        if not self.decides:
            return True
        small, large = self._fresh(self._small), self._fresh(self._large)
        loads = self._fresh(self._mixed if at_once else self._loads)
        if not large or min(len(small), len(loads)) < _FEWEST:
            return True
        least = _middle(took.seconds for took in small)
        per_token = max(_middle((took.seconds - least) / took.num_tokens for took in large), 0.0)
        if at_once:  # what these steps took beyond computing
            loads = [_beyond(took, least + per_token * took.num_tokens) for took in loads]
        return _line(loads, num_tokens) < num_tokens * per_token

    def _fresh(self, kept: deque[Took]) -> list[Took]:
        oldest = self._clock() - _AGE_S
        while kept and kept[0].at < oldest:
            kept.popleft()
        return list(kept)


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _beyond(took: Took, computing_s: float) -> Took:
    return replace(took, num_tokens=took.num_put_back, seconds=max(took.seconds - computing_s, 0.0))


def _line(loads: list[Took], num_tokens: int) -> float:
    """Seconds for so many tokens: what a short load takes, and what long ones took per token beyond that.

    What a token takes cannot be told from short loads: where there are no others it counts as nothing, and is
    known after the next long one.
    """
    least = min(took.seconds for took in loads)
    short = [took.seconds for took in loads if took.num_tokens < _LONG_LOAD]
    per_token = [(took.seconds - least) / took.num_tokens for took in loads if took.num_tokens >= _LONG_LOAD]
    return (_middle(short) if short else least) + (_middle(per_token) if per_token else 0.0) * num_tokens
