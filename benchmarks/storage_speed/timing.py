"""Times as ratios: whatever is compared runs in the same rounds, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

Arm = Callable[[], float]  # does its work once -> seconds of what counts


def timed(work: Callable[[], object]) -> Arm:
    """The whole of ``work`` counts."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def interleaved(arms: Mapping[str, Arm], rounds: int, pause_s: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each arm in every round, after one that does not count; the order turns.

    ``pause_s`` before each that counts, so that what another one does behind its work is over.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = max(0, number - 1) % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause_s if number else 0.0)
            seconds[name].append(arms[name]())
    return {name: times[1:] for name, times in seconds.items()}


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, the quartiles around it and the lowest; of a single value all are that."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = {"median": median(values), "q1": low, "q3": high, "min": min(values)}
    return {name: round(value, digits) for name, value in named.items()}


def ratios(yardstick: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How fast this was, the yardstick of the same round being 1."""
    return spread([one / other for one, other in zip(yardstick, seconds, strict=True)])


def against_median(yardstick: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Values as multiples of the yardstick's median, where the two were not measured in the same rounds."""
    return spread([one / median(yardstick) for one in values])


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
