"""Files made from good ones: bytes changed, cut, doubled, and words put in that have broken readers elsewhere."""

from __future__ import annotations

import random

from hypothesis import strategies as st

__all__ = ["WORDS", "mutant", "mutants"]

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
    """Return a changed copy: one to four changes, each at a random place."""
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


def mutants(good: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """Return a strategy of changed copies of good files, and now and then of bytes alone."""
    changed = st.builds(mutant, st.sampled_from(good), st.randoms(use_true_random=False))
    return st.one_of(changed, changed, changed, st.binary(max_size=200))
