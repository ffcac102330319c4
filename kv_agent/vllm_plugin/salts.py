"""What vLLM's prefix cache may hold under each salt, so that a local hit is never taken for what it is not.

A block that vLLM finds under a salt was left there by some earlier request with that salt and the same
tokens. Whether chunks were moved into it depends on that request, not on the one that finds it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from kv_agent.chunks import ChunkKey

# Moved chunks of one request, as (first token, end, key, tokens of the chunk left out) in order of
# position; () is plain computing.
Moves = tuple[tuple[int, int, ChunkKey, int], ...]

# Stands for KV of which nothing certain is known.
UNKNOWN: Moves = ((0, 1 << 62, ChunkKey(""), 0),)
_PACKED_UNKNOWN = b"?"
_ALL_UNKNOWN = (_PACKED_UNKNOWN,)

_KEY_BYTES = 16  # of a chunk's key, of a salt's digest

# Salts remembered; from the first forgotten one on, hits under salts unknown until then are not trusted.
MAX_SALTS = 200_000

# Different histories remembered of one salt; one more and no hit under it is trusted.
MAX_HISTORIES = 64


def cut_moves(moves: Moves, end: int) -> Moves:
    """The moves as far as they concern tokens ``[0, end)``."""
    return tuple((start, min(stop, end), key, skip) for start, stop, key, skip in moves if start < end)


class SaltLedger:
    """Remembers by salt which moves the requests made whose blocks may still be cached.

    Packed, because there are very many: some 200 bytes a salt and 28 a moved chunk.
    """

    def __init__(self) -> None:
        self._histories: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()
        self._forgot_some = False

    def record(self, salt: str, moves: Moves) -> None:
        """A request with this salt leaves KV in the cache in which just these chunks were moved."""
        digest = _digest(salt)
        # Once salts were forgotten, one that looks new may have a past.
        histories = self._histories.get(digest, _ALL_UNKNOWN if self._forgot_some else ())
        packed = _pack(moves)
        if histories != _ALL_UNKNOWN and packed not in histories:
            is_known = packed != _PACKED_UNKNOWN and len(histories) < MAX_HISTORIES
            histories = (*histories, packed) if is_known else _ALL_UNKNOWN
        self._histories[digest] = histories
        self._histories.move_to_end(digest)
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
            histories = _ALL_UNKNOWN if self._forgot_some else ()
        if histories == _ALL_UNKNOWN:
            return False
        expected = cut_moves(moves, end)
        return all(cut_moves(_unpack(history), end) == expected for history in histories or (b"",))


def _digest(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=_KEY_BYTES).digest()


def _pack(moves: Moves) -> bytes:
    """All first tokens, all ends, all tokens left out, all keys."""
    if moves == UNKNOWN:
        return _PACKED_UNKNOWN
    numbers = [move[0] for move in moves] + [move[1] for move in moves] + [move[3] for move in moves]
    return array("I", numbers).tobytes() + bytes.fromhex("".join([move[2] for move in moves]))


def _unpack(packed: bytes) -> Moves:
    """What was packed, if it is known."""
    numbers = array("I")
    count = len(packed) // (3 * numbers.itemsize + _KEY_BYTES)
    keys_at = 3 * numbers.itemsize * count
    numbers.frombytes(packed[:keys_at])
    keys = (packed[at : at + _KEY_BYTES].hex() for at in range(keys_at, len(packed), _KEY_BYTES))
    return tuple(
        (numbers[number], numbers[count + number], ChunkKey(key), numbers[2 * count + number])
        for number, key in enumerate(keys)
    )
