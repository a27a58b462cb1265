"""How often a file is run: as often as asked for, or less where its runs take long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateurs.errors import DataError

if TYPE_CHECKING:
    from secateurs.settings import TargetSettings

__all__ = ["Schedule", "fit_schedule"]

LEAST_REPEATS = 4
LEAST_WARMUP = 2
LEAST_EXAMPLES = 8
_BESIDE = 2 + 3 * 3 + 2 * 2 + 2 * 6
"""Runs of each file for memory, profile and placement, and the first of each latency process, roughly."""


@dataclass(frozen=True)
class Schedule:
    """Settings that keep within a time.

    Attributes:
        settings: the target, perhaps with fewer repeats.
        examples: seeded examples for agreement.
        notes: what was reduced.
    """

    settings: TargetSettings
    examples: int
    notes: tuple[str, ...] = ()


def fit_schedule(settings: TargetSettings, examples: int, run_ms: float, seconds: float) -> Schedule:
    """Reduce warm-up, repeats and seeded examples until the runs fit into a time.

    Args:
        settings: as asked for.
        examples: seeded examples for agreement.
        run_ms: one run of the slower file.
        seconds: that all runs may take, on one target, without more processes than `settings.processes`.

    Raises:
        DataError: not even the least number of runs fits.
    """

    def cost(repeats: int, warmup: int, drawn: int) -> float:
        runs = settings.processes * (4 * repeats + 2 * warmup + 2) + 2 * -(-drawn // settings.batch_size) + _BESIDE
        return runs * run_ms / 1e3

    repeats, warmup, drawn = settings.repeats, settings.warmup, examples
    while cost(repeats, warmup, drawn) > seconds:
        smaller = (max(repeats // 2, LEAST_REPEATS), max(warmup // 2, LEAST_WARMUP), max(drawn // 2, LEAST_EXAMPLES))
        smaller = (min(smaller[0], repeats), min(smaller[1], warmup), min(smaller[2], drawn))
        if smaller == (repeats, warmup, drawn):
            raise DataError(
                f"one run takes {run_ms / 1e3:.2f} s, and the fewest runs that give a verdict {cost(*smaller):.0f} s; files of this size get "
                f"{seconds:.0f} s. If that is what the files are meant to do, allow more with `--time-limit SECONDS`."
            )
        repeats, warmup, drawn = smaller
    if (repeats, drawn) == (settings.repeats, examples):
        return Schedule(settings, examples)
    note = (
        f"one run takes {run_ms:.0f} ms, so there were {repeats} rounds per process instead of {settings.repeats} and agreement was taken on "
        f"{drawn} seeded examples instead of {examples}; `--time-limit` allows more than {seconds:.0f} s"
    )
    return Schedule(settings.model_copy(update={"repeats": repeats, "warmup": warmup}), drawn, (note,))
