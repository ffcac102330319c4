"""What vLLM's prefix cache may hold under each salt, so that a local hit is never taken for what it is not.

A block that vLLM finds under a salt was left there by some earlier request with that salt and the same
tokens. Whether chunks were moved into it depends on that request, not on the one that finds it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from kv_agent.chunks import ChunkKey

# Moved chunks of one request, as (first token, end, key, tokens of the chunk left out) in order of
# position; () is plain computing.
Moves = tuple[tuple[int, int, ChunkKey, int], ...]

# Stands for KV of which nothing certain is known.
UNKNOWN: Moves = ((0, 1 << 62, ChunkKey(""), 0),)

# Salts remembered; from the first forgotten one on, hits under salts unknown until then are not trusted.
MAX_SALTS = 200_000

# Different histories remembered of one salt; one more and no hit under it is trusted.
MAX_HISTORIES = 64


def cut_moves(moves: Moves, end: int) -> Moves:
    """The moves as far as they concern tokens ``[0, end)``."""
    return tuple((start, min(stop, end), key, skip) for start, stop, key, skip in moves if start < end)


class SaltLedger:
    """Remembers by salt which moves the requests made whose blocks may still be cached."""

    def __init__(self) -> None:
        self._histories: OrderedDict[bytes, set[Moves]] = OrderedDict()
        self._forgot_some = False

    def record(self, salt: str, moves: Moves) -> None:
        """A request with this salt leaves KV in the cache in which just these chunks were moved."""
        digest = _digest(salt)
        # Once salts were forgotten, one that looks new may have a past.
        histories = self._histories.setdefault(digest, {UNKNOWN} if self._forgot_some else set())
        self._histories.move_to_end(digest)
        if UNKNOWN not in histories:
            histories.add(moves)
            if len(histories) > MAX_HISTORIES:
                histories.clear()
                histories.add(UNKNOWN)
        while len(self._histories) > MAX_SALTS:
            self._histories.popitem(last=False)
            self._forgot_some = True

    def agrees(self, salt: str | None, moves: Moves, end: int) -> bool:
        """Whether a local hit of ``end`` tokens surely holds what a request with these ``moves`` expects.

        Without a salt everything was computed as usual, since nothing is injected then.
        """
        if salt is None or end == 0:
            return True
        histories = self._histories.get(_digest(salt))
        if histories is None:
            histories = {UNKNOWN if self._forgot_some else ()}
        expected = cut_moves(moves, end)
        return all(cut_moves(history, end) == expected for history in histories)


def _digest(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()
