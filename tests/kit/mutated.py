"""Small changes to files, drawn from a generator: what a fuzzer tries."""

import math
import random
from typing import Any

ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "x",
    "-1",
    "nan",
    "\ud800",
    "../x",
    "F64",
]
ODD += [[], [[]], {}, {"a": 1}, [1, 2, 3], [-1], [0, 2**62], ["1"], [None], "9" * 5000]


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Returns bytes with a few of them changed, put in, left out or doubled."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(changed)), draw.choice([1, 1, 2, 8, 50])
        part = changed[at : at + size]
        changed[at : at + size] = draw.choice(
            [draw.randbytes(size), b"", part + part, b'{"[]}0,:'[: draw.randint(1, 8)], b"9" * size]
        )
    return bytes(changed)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """Returns JSON data in which one place, anywhere, holds something odd, is gone, or has another name."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        changed = dict(value) if isinstance(value, dict) else list(value)
        kind = draw.random()
        if kind < 0.15:
            del changed[key]
        elif kind < 0.3 and isinstance(changed, dict):
            changed[draw.choice(["", "x", "step", "rank-9.safetensors", "\ud800", "a" * 5000])] = (
                changed.pop(key)
            )
        else:
            changed[key] = mutated_json(changed[key], draw)
        return changed
    return draw.choice(ODD)
