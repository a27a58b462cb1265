"""onnxruntime's arena, followed byte by byte: what a sequence of allocations holds at its peak.

The arena takes regions from the system (the first of 1 MiB, each further one at least twice as large), cuts chunks from them in multiples of
256 bytes, gives a request the smallest free chunk that holds it, and cuts off the rest of a chunk only if it is at least as large as the
request. A request may therefore hold up to twice its size: what onnxruntime counts, and what `mem_in_use_peak` of its profile shows.

References:
    The "best fit with coalescing" allocator of TensorFlow, which onnxruntime's `BFCArena` follows.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

__all__ = ["FIRST_REGION", "Arena"]

ALIGNMENT = 256
FIRST_REGION = 1 << 20
"""Bytes of the first region; every region is a multiple of it."""
DEAD_BYTES = 128 << 20
"""A rest of this size is cut off, however large the request."""


@dataclass(eq=False)
class _Chunk:
    region: int
    start: int
    size: int
    free: bool = True
    before: _Chunk | None = None
    after: _Chunk | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """The order in which free chunks are tried: the smallest first, then by address."""
        return (self.size, self.region, self.start)


@dataclass
class Arena:
    """The state of an arena.

    >>> arena = Arena()
    >>> arena.allocate("a", 600_000)
    >>> arena.in_use  # the rest of the region is smaller than the request and stays with it
    1048576
    >>> arena.release("a")
    >>> arena.allocate("b", 1_000)
    >>> arena.in_use, arena.peak
    (1024, 1048576)

    Attributes:
        reserved: bytes that are held all the time: packed weights and small constants.
        in_use: bytes held now.
        peak: the most bytes ever held.
    """

    reserved: int = 0
    in_use: int = field(init=False)
    peak: int = field(init=False)

    def __post_init__(self) -> None:
        self.in_use = self.peak = self.reserved
        self._free: list[tuple[tuple[int, int, int], _Chunk]] = []
        self._held: dict[str, _Chunk] = {}
        self._regions = 0
        self._next_region = FIRST_REGION

    def allocate(self, name: str, size: int) -> None:
        """Hold `size` bytes under `name`; nothing for a size of 0."""
        if size == 0:
            return
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        position = bisect.bisect_left(self._free, (rounded, -1, -1), key=lambda item: item[0])
        if position == len(self._free):
            self._extend(rounded)
            position = bisect.bisect_left(self._free, (rounded, -1, -1), key=lambda item: item[0])
        _, chunk = self._free.pop(position)
        if chunk.size >= 2 * rounded or chunk.size - rounded >= DEAD_BYTES:
            rest = _Chunk(chunk.region, chunk.start + rounded, chunk.size - rounded, before=chunk, after=chunk.after)
            if chunk.after is not None:
                chunk.after.before = rest
            chunk.after, chunk.size = rest, rounded
            self._offer(rest)
        chunk.free = False
        self._held[name] = chunk
        self.in_use += chunk.size
        self.peak = max(self.peak, self.in_use)

    def release(self, name: str) -> None:
        """Give back what `name` holds, joined with free neighbours."""
        chunk = self._held.pop(name, None)
        if chunk is None:
            return
        self.in_use -= chunk.size
        chunk.free = True
        if chunk.after is not None and chunk.after.free:
            self._withdraw(chunk.after)
            self._merge(chunk, chunk.after)
        if chunk.before is not None and chunk.before.free:
            before = chunk.before
            self._withdraw(before)
            self._merge(before, chunk)
            chunk = before
        self._offer(chunk)

    def _extend(self, rounded: int) -> None:
        grown = False
        while rounded > self._next_region:
            self._next_region *= 2
            grown = True
        self._offer(_Chunk(self._regions, 0, self._next_region))
        self._regions += 1
        if not grown:
            self._next_region *= 2

    def _offer(self, chunk: _Chunk) -> None:
        bisect.insort(self._free, (chunk.key, chunk), key=lambda item: item[0])

    def _withdraw(self, chunk: _Chunk) -> None:
        self._free.pop(bisect.bisect_left(self._free, chunk.key, key=lambda item: item[0]))

    @staticmethod
    def _merge(first: _Chunk, second: _Chunk) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
