"""Ways in which a blob file can be wrong, from a flipped bit to a header that lies consistently."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

DEEP = "[" * 3000 + "]" * 3000
# JSON texts, some of which no JSON writer would write.
VALUES = [
    "null", "true", "0", "1", "-1", "2.0", "1e400", "NaN", "-Infinity", '""', '"x"', "[]", "{}", "[[]]", DEEP,
    str(2**31), str(2**62), str(2**63), str(2**64), str(10**30), "9" * 5000, '"\\ud800"', '"F32"', '"I64"',
    '["F16"]', "[0, 0]", "[0]", "[0, 1, 2]", "[-8, 0]", f"[{2**63}, 0]", f"[0, {2**63}, 0, 1, 1]",
    "[1, 1, 1, 1, 1, 1, 1]", str([1] * 70), '"kv_agent"', '"2"', '{"k": 1}',
]  # fmt: skip

# Of the size of what stands there: only the layout tells. Told there alike, nothing would; see FORMAT.md.
DTYPES = ['"F16"', '"BF16"', '"U8"', '"I8"', '"F8_E4M3"', '"F8_E5M2"']


def flip_bits(data: bytes, pick: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(pick.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
    return bytes(changed)


def set_bytes(data: bytes, pick: random.Random) -> bytes:
    start = pick.randrange(len(data) + 1)
    length = min(pick.choice((1, 2, 8, 64)), len(data) - start)
    filler = pick.choice((b"\0", b"\xff", b"9", b'"', b"\\", b"{", b" "))
    return data[:start] + filler * length + data[start + length :]


def truncate(data: bytes, pick: random.Random) -> bytes:
    return data[: pick.randrange(len(data) + 1)]


def insert(data: bytes, pick: random.Random) -> bytes:
    at = pick.randrange(len(data) + 1)
    return data[:at] + pick.randbytes(pick.choice((1, 2, 8, 100))) + data[at:]


def remove(data: bytes, pick: random.Random) -> bytes:
    at = pick.randrange(len(data) + 1)
    return data[:at] + data[at + pick.choice((1, 2, 8, 100)) :]


def swap_halves(data: bytes, pick: random.Random) -> bytes:
    one, two = sorted(pick.randrange(len(data) + 1) for _ in range(2))
    return data[:one] + data[two:] + data[one:two]


def change_header_length(data: bytes, pick: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    wrong = pick.choice((0, 1, length - 1, length + 1, length * 2, len(data), 2**31, 2**63, 2**64 - 1))
    return (wrong % 2**64).to_bytes(8, "little") + data[8:]


def edit_header(data: bytes, pick: random.Random) -> bytes:
    """Change, remove, rename or swap values anywhere in the header, in JSON within JSON too."""
    length = int.from_bytes(data[:8], "little")
    try:
        fields = json.loads(data[8 : 8 + length])
        marks = _edit_somewhere(fields, pick)
        header = json.dumps(fields)
    except (ValueError, RecursionError):  # an earlier mutation made it no JSON
        return flip_bits(data, pick)
    for mark, text in marks.items():
        header = header.replace(f'"{mark}"', text).replace(f'\\"{mark}\\"', text.replace('"', '\\"'))
    encoded = header.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]


def _edit_somewhere(fields: Any, pick: random.Random) -> dict[str, str]:
    """Edit ``fields`` -> marks standing in it for JSON texts that Python would not write."""
    if not isinstance(fields, dict) or not fields:
        return {}
    text = pick.choice(VALUES)
    names = [name for name in fields if isinstance(fields[name], dict) and name != "__metadata__"]
    metadata = fields.get("__metadata__")
    how = pick.randrange(5)
    if how == 0 and names and isinstance(metadata, dict):  # a lie that layout confirms
        name, part = pick.choice(names), pick.choice(("shape", "dtype"))
        try:
            layout = json.loads(metadata["layout"])
            layout[name][["dtype", "shape"].index(part)] = fields[name][part] = "MARK"
            metadata["layout"] = json.dumps(layout)
        except (ValueError, KeyError, TypeError, IndexError):
            return {}
        return {"MARK": text}
    if how == 1 and len(names) > 1:  # one tensor's bytes under another's name
        one, two = pick.sample(names, 2)
        fields[one], fields[two] = fields[two], fields[one]
        return {}
    place: Any = fields
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return {}
        key = pick.choice(keys)
        if isinstance(place[key], dict | list) and pick.random() < 0.8:
            place = place[key]
            continue
        break
    if how == 2:
        del place[key]
        return {}
    if how == 3 and isinstance(place, dict):
        place[pick.choice(("x", "dtype", "shape", "__metadata__"))] = place.pop(key)
        return {}
    if isinstance(place[key], int) and pick.random() < 0.6:
        place[key] = place[key] + pick.choice((-8, -1, 1, 2, 8))
        return {}
    place[key] = "MARK"
    return {"MARK": pick.choice(DTYPES) if key == "dtype" else text}


MUTATIONS: list[Mutation] = [
    flip_bits, set_bytes, truncate, insert, remove, swap_halves, change_header_length,
    edit_header, edit_header, edit_header, edit_header,
]  # fmt: skip


def mutated(data: bytes, pick: random.Random) -> bytes:
    """``data`` after one to three mutations, which may undo each other."""
    for _ in range(pick.choice((1, 1, 2, 3))):
        data = pick.choice(MUTATIONS)(data, pick)
    return data
