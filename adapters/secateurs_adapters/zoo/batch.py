"""A whole zoo: from entries to a leaderboard, resumed where an interrupted one stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from secateurs.errors import RecipeError, UserError
from secateurs.files import refuse_links, write_text
from secateurs_adapters.zoo.keys import environment_digest, result_key
from secateurs_adapters.zoo.leaderboard import Row, leaderboard_csv, leaderboard_json, rows
from secateurs_adapters.zoo.page import leaderboard_page
from secateurs_adapters.zoo.results import STATE, Job, Result
from secateurs_adapters.zoo.spec import Entry

__all__ = ["Batch", "Execute", "make_jobs"]

Execute = Callable[[Sequence[Job], Callable[[Job, Result], None], Callable[[], None]], None]
"""Runs jobs, tells of each result, and calls something twice a second."""
_FRESH = 2.0
"""Seconds after which the leaderboard on the disk may be older than the results."""


def make_jobs(entries: Sequence[Entry], output: Path, *, threads: int = 1) -> list[Job]:
    """Return a job for each entry, with the key of its result.

    Args:
        entries: of the zoo.
        output: the zoo's folder.
        threads: of torch in each process.

    Raises:
        RecipeError: two entries would do the same.
    """
    environment, jobs = environment_digest(), list[Job]()
    for entry in entries:
        job = Job(
            name=entry.name,
            key=result_key(entry.recipe, environment),
            recipe=entry.recipe.to_yaml(),
            source=str(entry.source),
            output=output.absolute(),
            directory=Path.cwd(),
            environment=environment,
            timeout=entry.limits.timeout,
            memory_mib=entry.limits.memory_mib,
            retries=entry.limits.retries,
            threads=threads,
        )
        same = next((other.name for other in jobs if other.key == job.key), None)
        if same is not None:
            raise RecipeError(f"{same!r} and {job.name!r} do the same; leave one of them out, or `set` something else.")
        jobs.append(job)
    return jobs


@dataclass
class Batch:
    """The jobs of a zoo and what has become of them.

    Attributes:
        jobs: in order.
        output: the zoo's folder.
        results: by key.
        reused: results that an earlier zoo had left.
    """

    jobs: list[Job]
    output: Path
    results: dict[str, Result] = field(default_factory=dict)
    reused: int = field(default=0, init=False)
    _written: float = field(default=0.0, init=False)

    @property
    def rows(self) -> list[Row]:
        """The leaderboard as it stands."""
        return rows(self.jobs, self.results)

    def run(self, execute: Execute, *, resume: bool = False, retry_failed: bool = False) -> None:
        """Run every job that has no result yet, and write the leaderboard.

        Args:
            execute: an executor.
            resume: go on in a folder that an earlier zoo left; only what has no result is run.
            retry_failed: run what ended without a verdict again too.

        Raises:
            UserError: the folder holds something else, or another zoo works in it.
        """
        self._check_folder(resume=resume)
        state = self.output / STATE
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the zoo's folder {str(self.output)!r}: {error.strerror}; choose another with `--output`."
            ) from None
        try:
            with FileLock(state / "zoo.lock", timeout=0):
                self._run(execute, retry_failed)
        except Timeout:
            raise UserError(
                f"another zoo works in {str(self.output)!r}; wait for it, or choose another `--output`."
            ) from None

    def _check_folder(self, *, resume: bool) -> None:
        if self.output.is_symlink() or (self.output.exists() and not self.output.is_dir()):
            raise UserError(f"the output {str(self.output)!r} is not a plain folder; choose another with `--output`.")
        refuse_links(self.output)
        content = sorted(path.name for path in self.output.iterdir()) if self.output.exists() else []
        if not content:
            return
        if not resume:
            raise UserError(
                f"the output folder {str(self.output)!r} is not empty ({', '.join(content[:5])}); "
                f"give `--resume` or another `--output`."
            )
        if STATE not in content:
            raise UserError(f"the folder {str(self.output)!r} holds no zoo; choose another with `--output`.")

    def _run(self, execute: Execute, retry_failed: bool) -> None:
        for name in ("results", "."):
            for left in (self.output / name).glob(".*.partial"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
        pending = []
        for job in self.jobs:
            found = job.result()
            if found is not None and job.settled(retry_failed=retry_failed):
                self.results[job.key] = found
            else:
                job.result_path.unlink(missing_ok=True)
                pending.append(job)
            job.stage_path.unlink(missing_ok=True)
        self.reused = len(self.results)
        self._write()
        try:
            if pending:
                execute(pending, self._done, self._tick)
        finally:
            self._write()

    def _done(self, job: Job, result: Result) -> None:
        self.results[job.key] = result

    def _tick(self) -> None:
        if time.monotonic() - self._written > _FRESH:
            self._write()

    def _write(self) -> None:
        """Write the leaderboard in every form."""
        found = self.rows
        write_text(self.output / "leaderboard.csv", leaderboard_csv(found))
        write_text(self.output / "leaderboard.json", leaderboard_json(found, self.results))
        write_text(self.output / "leaderboard.html", leaderboard_page(found))
        self._written = time.monotonic()
