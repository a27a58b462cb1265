"""Starting the process of a model: fresh, or forked from a warm one.

Both kinds have a session of their own, so that they end with everything they started, and both end when the process that
launched them does, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Protocol

from secateurs.errors import SecateursError, UserError

if TYPE_CHECKING:
    from secateurs_adapters.zoo.results import Job

__all__ = ["Fresh", "Launcher", "Started", "Warm", "launcher"]

_THREADS = "OMP_NUM_THREADS"


class Started(Protocol):
    """A running process."""

    pid: int

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, negative for a signal, or None if it still runs after `seconds`."""

    def kill(self) -> None:
        """End it and all that it started, and wait until it has ended; nothing happens if it has."""


class Launcher(Protocol):
    """Starts processes, one at a time."""

    def start(self, job: Job) -> Started:
        """Start the process of a job whose request is written."""

    def close(self) -> None:
        """Let go of everything; processes that still run end."""


def launcher(*, warm: bool, threads: int) -> Launcher:
    """Return a launcher of fresh or of warm processes, of so many torch threads each.

    Raises:
        UserError: this system lacks what the processes are watched with.
    """
    if os.name != "posix":
        raise UserError("`secateurs zoo` needs a POSIX system (Linux, macOS); on Windows, run it in WSL.")
    return Warm(threads) if warm else Fresh(threads)


class _Lifeline:
    """A pipe that closes with this process: the other end is what `worker.end_with` watches."""

    def __init__(self) -> None:
        self.end, self._held = os.pipe()

    def close(self) -> None:
        for end in (self.end, self._held):
            with contextlib.suppress(OSError):
                os.close(end)


def _environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    own = os.environ.get(_THREADS, "")
    most = min(threads, int(own)) if own.isdecimal() and int(own) else threads  # who asks for fewer gets fewer
    return {**os.environ, "PYTHONPATH": path, _THREADS: str(most)}


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class Fresh:
    """Starts a new interpreter for each model."""

    def __init__(self, threads: int) -> None:
        self._life, self._threads = _Lifeline(), threads

    def start(self, job: Job) -> Started:
        """Start a process; see `Launcher`."""
        # -P keeps the working directory, and with it any module that lies there, off the import path.
        command = [sys.executable, "-P", "-m", "secateurs_adapters.zoo.worker", str(job.request), str(self._life.end)]
        with job.log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.directory,
                env=_environment(self._threads),
                pass_fds=(self._life.end,),
                start_new_session=True,
            )
        return _FreshProcess(process)

    def close(self) -> None:
        """Let go; see `Launcher`."""
        self._life.close()


class _FreshProcess:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid

    def wait(self, seconds: float) -> int | None:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        _kill_group(self.pid)  # what it started and left behind
        return code

    def kill(self) -> None:
        if self._process.returncode is None:
            _kill_group(self.pid)
            self._process.wait()


class Warm:
    """Forks each process from one that has imported everything; see `nursery`."""

    def __init__(self, threads: int) -> None:
        self._life, self._threads = _Lifeline(), threads
        self._nursery: subprocess.Popen[bytes] | None = None

    def start(self, job: Job) -> Started:
        """Start a process; see `Launcher`."""
        request = json.dumps([str(job.request), str(job.log), str(job.directory)]) + "\n"
        for _ in range(2):  # the nursery may have been killed since
            nursery = self._nursery = self._nursery or self._open(job)
            assert nursery.stdin is not None
            assert nursery.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                nursery.stdin.write(request.encode())
                if answer := nursery.stdout.readline():
                    return _WarmProcess(int(answer), nursery)
            self._end_nursery()
        raise SecateursError(f"the warm process that models are forked from does not start; see {str(job.log)!r}.")

    def _open(self, job: Job) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "secateurs_adapters.zoo.nursery", str(self._life.end)]
        with job.log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self._threads),
                pass_fds=(self._life.end,),
                start_new_session=True,
            )

    def _end_nursery(self) -> None:
        if self._nursery is not None:
            _kill_group(self._nursery.pid)
            with self._nursery:
                self._nursery.wait()
        self._nursery = None

    def close(self) -> None:
        """Let go; see `Launcher`."""
        self._life.close()
        self._end_nursery()


class _WarmProcess:
    def __init__(self, pid: int, nursery: subprocess.Popen[bytes]) -> None:
        self.pid, self._nursery = pid, nursery
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        answers = self._nursery.stdout
        assert answers is not None
        if self._code is None and select.select([answers], [], [], seconds)[0]:
            answer = answers.readline()
            self._code = int(answer) if answer else -signal.SIGKILL  # no answer: the nursery was killed
            _kill_group(self.pid)
        return self._code

    def kill(self) -> None:
        while self._code is None:
            _kill_group(self.pid)
            self.wait(1.0)
