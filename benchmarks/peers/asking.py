"""What the benchmark asks of a peer's engine, and whether what it remembers came back from the peer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from math import nan
from typing import Any, Protocol

from benchmarks.engine_speed.engines import Answer

_FORGET_TIMEOUT_S = 30.0
_STORED_TIMEOUT_S = 20.0
_LOOK_EVERY_S = 0.5
_FEWEST_LOOKS = 3  # computing a long memory twice may take longer than a peer needs to store it


class Engine(Protocol):
    """An engine in this process's environment or another's."""

    def ask(self, token_ids: Sequence[int], *, salt: str | None = None, **options: Any) -> Answer: ...

    def forget_local(self) -> bool: ...

    def close(self) -> None: ...


class Remembered:
    """A memory that a peer was given, asked for again and again, always behind an empty local prefix cache.

    ``num_brought`` is the fewest tokens that came back. ``missed`` says how the peer failed to bring them
    back, and is None when it did.
    """

    def __init__(self, engine: Engine, num_tokens: int, prompt: Callable[[], Sequence[int]]) -> None:
        self._engine, self._num_tokens, self._prompt = engine, num_tokens, prompt
        self._failure: str | None = None
        self.num_brought = num_tokens

    @property
    def missed(self) -> str | None:
        """Half of the memory has to come back: some keep whole blocks only, and compute the last."""
        if self._failure is None and 2 * self.num_brought < self._num_tokens:
            return f"{self.num_brought} of {self._num_tokens} tokens came back"
        return self._failure

    def store(self, timeout_s: float) -> None:
        """Give it to the peer, with a turn as some know whole prompts only, and wait until it comes back."""
        deadline = time.monotonic() + timeout_s
        self._asked(self._prompt())
        for number in itertools.count(1):
            self.num_brought = self._num_tokens
            self.ttft_s()
            is_late = number >= _FEWEST_LOOKS and time.monotonic() > deadline
            if self.missed is None or self._failure is not None or is_late:
                return
            time.sleep(_LOOK_EVERY_S)

    def ttft_s(self) -> float:
        """Ask another turn behind the memory -> seconds to its first token, not a number if that failed."""
        answer = self._asked(self._prompt())
        self.num_brought = min(self.num_brought, answer.num_cached if answer else 0)
        return answer.ttft_s if answer else nan

    def _asked(self, token_ids: Sequence[int]) -> Answer | None:
        try:
            forget(self._engine)
            return self._engine.ask(token_ids)
        except (RuntimeError, TimeoutError) as err:
            self._failure = str(err)
            return None


def remembered(
    engine: Engine,
    num_tokens: int,
    prompt: Callable[[], Sequence[int]],
    timeout_s: float = _STORED_TIMEOUT_S,
) -> Remembered:
    """Give a peer a memory of so many tokens; ``prompt`` makes turns behind it."""
    found = Remembered(engine, num_tokens, prompt)
    found.store(timeout_s)
    return found


def forget(engine: Engine, timeout_s: float = _FORGET_TIMEOUT_S) -> None:
    """Empty vLLM's own prefix cache, once its connector has let go of all blocks.

    Raises ``TimeoutError`` when it does not: what is asked next would be vLLM's own hit.
    """
    deadline = time.monotonic() + timeout_s
    while not engine.forget_local():
        if time.monotonic() > deadline:
            raise TimeoutError(f"blocks are still in use after {timeout_s:.0f} s")
        time.sleep(0.02)
