"""A process that has imported everything heavy and forks one child per model: fresh and apart, without the wait for imports.

Started as `python -m secateurs_adapters.zoo.nursery FD`. It reads requests from standard input, a line of JSON each,
and answers each with two lines: the child's process id, and its exit code once it has ended. It computes nothing
itself: a process that has threads or has touched a device cannot be forked safely.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

__all__ = ["PRELOADED"]

PRELOADED = (
    "torch",
    "onnxscript",
    "secateurs.runner",
    "secateurs_adapters.datasets",
    "secateurs_adapters.export",
    "secateurs_adapters.metrics",
    "secateurs_adapters.models",
    "secateurs_adapters.report_html",
    "secateurs_adapters.validate",
    "secateurs_adapters.zoo.worker",
)
"""What most recipes need; one that is not installed is left to the recipes that need it."""


def main(life: int) -> None:
    """Answer requests until standard input ends."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # the collector of a child would touch, and so copy, every page of these modules
    for line in sys.stdin:
        request, log, directory = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(life, Path(request), log, directory)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(life: int, request: Path, log: str, directory: str) -> None:
    """Become the process of one model; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(directory)
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        from secateurs_adapters.zoo.worker import end_with, serve

        end_with(life)
        serve(request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
