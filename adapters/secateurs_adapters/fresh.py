"""Fresh processes: one function of one module, run by an interpreter of its own, JSON in and JSON out.

Memory figures are clean and a crash stays where it is only in a process that did nothing else. Free of torch and of onnxruntime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs import errors
from secateurs.errors import SecateursError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["in_fresh_process", "serve"]


def in_fresh_process(
    module: str,
    request: Mapping[str, Any],
    *,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `python -m module` on a request in a process of its own, and return its answer; see `serve`.

    Args:
        module: what to run.
        request: plain data.
        seconds: after this long the process is ended; None waits for ever.
        environment: variables to set in it, beside this process's own.

    Raises:
        SecateursError: the process failed or took too long; an error that Secateurs raised there keeps its class.
    """
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        # -P keeps the working directory, and with it any module that lies there, off the child's import path.
        command = [sys.executable, "-P", "-m", module, str(file)]
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter and module, no shell
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env={**os.environ, **(environment or {}), "PYTHONPATH": path},
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise SecateursError(f"the measuring process {module} was ended after {seconds:g} s.") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        cause = (
            f"killed by signal {-done.returncode}, perhaps for want of memory"
            if done.returncode < 0
            else f"exit code {done.returncode}"
        )
        raise SecateursError(
            f"the measuring process {module} failed ({cause}): {said}. Lower `batch_size`, or check that the file runs."
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise getattr(errors, answer["kind"], SecateursError)(answer["error"])
    return answer


def serve(handler: Callable[[dict[str, Any]], Mapping[str, Any]], arguments: Sequence[str]) -> None:
    """Answer a request in a fresh process: read the file named in `arguments`, print the answer as a line of JSON."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        answer = dict(handler(request))
    except SecateursError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer), flush=True)
