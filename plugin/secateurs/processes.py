"""The processes that share one run: which of them this is, and what the main one lets the others know.

A launcher (`accelerate launch`, `torchrun`) starts the same command several times and says so in the environment. Every process then does the
same work on the same data; training is shared (`secateurs.loops`), and what is written or measured is done by the main process alone.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from secateurs.errors import UserError

__all__ = ["count", "from_main", "is_main", "join", "rank"]

Value = TypeVar("Value")

# torchrun's names first, then those of the MPI launchers, as accelerate reads them.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_PATIENCE = timedelta(days=7)
"""How long the others wait while the main process measures."""
_GRACE = 0.3
"""Seconds that gloo's threads have to let go of their tensors before the interpreter ends."""


def count() -> int:
    """Return how many processes share this run."""
    return max(1, _number(_SIZES, 1))


def rank() -> int:
    """Return the number of this process, 0 for the main one."""
    return _number(_RANKS, 0) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this process writes, measures and prints; the only process of a run does."""
    return rank() == 0


def _number(names: tuple[str, ...], default: int) -> int:
    given = next((os.environ[name] for name in names if name in os.environ), "")
    return int(given) if given.isdecimal() else default


def join() -> Any:
    """Connect this process with the others and return accelerate's `PartialState`.

    Raises:
        UserError: accelerate is not installed, or it counts other processes than the environment does.
    """
    try:
        from accelerate import PartialState
    except ImportError:
        raise UserError(
            f"{count()} processes were started for one run, which needs accelerate, and it is not installed; "
            f"pip install 'secateurs[train]', or start one process."
        ) from None
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        atexit.register(_leave)
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=forced or not torch.accelerator.is_available())
    if state.num_processes != count():
        raise UserError(
            f"the environment speaks of {count()} processes, and accelerate of {state.num_processes}; "
            f"start them with `accelerate launch` or `torchrun`, each on a device of its own."
        )
    return state


def from_main(make: Callable[[], Value], write: Callable[[Value], str], read: Callable[[str], Value]) -> Value:
    """Return what `make` returns in the main process, in every process; the others wait for it.

    Args:
        make: called in the main process only.
        write: turns its value into text, for the way to the other processes.
        read: turns the text back.
    """
    if count() == 1:
        return make()
    import numpy as np
    import torch
    from torch import distributed

    group = _group()
    value, told = None, b""
    if is_main():
        value = make()
        told = write(value).encode()
    size = torch.tensor([len(told)])
    distributed.broadcast(size, 0, group)
    text = torch.from_numpy(np.frombuffer(told.ljust(int(size)), dtype=np.uint8).copy())
    distributed.broadcast(text, 0, group)
    return read(text.numpy().tobytes().decode()) if value is None else value


def _leave() -> None:
    """Close what we opened, and let gloo's threads finish.

    Such a thread lets go of the tensors of its last work after the process that waited for it went on, and needs the interpreter for it.
    If the interpreter is gone by then, the process aborts. Deleting a group waits for its threads; where others hold on to the group,
    sleeping leaves the interpreter to them.
    """
    from torch import distributed

    if not distributed.is_initialized():
        return
    own = [_group()] if _group.cache_info().currsize else []
    _group.cache_clear()
    if distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
    else:
        for group in own:
            distributed.destroy_process_group(group)
    own.clear()
    time.sleep(_GRACE)


@functools.cache
def _group() -> Any:
    """Return a group on the CPU that waits longer than one for training does."""
    join()
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=_PATIENCE)
