"""Files made from good ones: bytes changed, cut, doubled, and words put in that have broken readers elsewhere.

JSON and YAML are also changed as what they say: values of other kinds and sizes, keys that are gone or swapped, longer lists. Such files reach
what comes after parsing.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import yaml
from hypothesis import strategies as st

__all__ = ["VALUES", "WORDS", "mutant", "mutants", "reworded"]

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2**31,
        2**63,
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "0",
        "1",
        "a",
        "weight",
        "bias",
        "in_features",
        "__class__",
        "__dict__",
        "0.weight",
        ".",
        "..",
        "../a",
        "/dev/zero",
    ),
    *("\x00", "\ud800", "a" * 5000, [], [0], [-1], [0, 0], [[]], [[[[0]]]], {}, {"a": 1}, {"": {}}, {"__proto__": 1}),
)
"""What a place in a document is given."""

WORDS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"-1",
    b"99999999999999999999",
    b"null",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"(" * 300,
    b"&a [*a, *a]",
    b"!!python/object/apply:os.system [id]",
    b"../../../../etc/passwd",
    b"C:\\Windows\\x",
    b"/dev/zero",
    b"\x00",
    b"\xff\xfe",
    b"\\ud800",
    b"\\u0000",
    b"\x1b[2J",
    b"<script>alert(1)</script>",
    b"${data_dir}",
    b"__class__",
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"\x93NUMPY\x01\x00",
    b'"schema_version": 1, "schema_version": 1,',
)
"""Pieces that mean something to some reader."""


def mutant(content: bytes, rng: random.Random) -> bytes:
    """Return a changed copy: one to four changes, each at a random place; every second document is changed as what it says."""
    said = rng.random() < 0.5 and reworded(content, rng)
    if said:
        return said
    body = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(body))
        match rng.randrange(6):
            case 0 if body:
                body[min(at, len(body) - 1)] = rng.randrange(256)
            case 1:
                del body[at:]
            case 2:
                del body[at : at + rng.randint(1, 16)]
            case 3:
                body[at:at] = rng.choice(WORDS)
            case 4:
                body[at : at + rng.randint(1, 16)] = rng.choice(WORDS)
            case _:
                start = rng.randint(0, len(body))
                body[at:at] = body[start : start + rng.randint(1, 64)]
    return bytes(body)


def reworded(content: bytes, rng: random.Random) -> bytes | None:
    """Return a document of the same form with one or two things in it changed; None where the content is no document."""
    try:
        document = yaml.safe_load(content.decode())
    except (UnicodeDecodeError, yaml.YAMLError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    for _ in range(rng.randint(1, 2)):
        places = list(_places(document))
        if not places:
            break
        (holder, key), (other, there) = rng.choice(places), rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1:
                holder[key] = copy.deepcopy(other[there])
            case 2 if isinstance(holder, list):
                holder += [copy.deepcopy(holder[key]) for _ in range(rng.randint(1, 3))]
            case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] += rng.choice((-1, 1, 1000))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(document, default=str).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in nested mappings and lists, as what holds it and its key."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [place for key, inner in pairs for place in ((value, key), *_places(inner))]


def mutants(good: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """Return a strategy of changed copies of good files, and now and then of bytes alone."""
    changed = st.builds(mutant, st.sampled_from(good), st.randoms(use_true_random=False))
    return st.one_of(changed, changed, changed, st.binary(max_size=200))
