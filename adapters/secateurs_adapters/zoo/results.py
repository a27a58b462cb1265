"""A model of the zoo as a job, its result, and where both lie on the disk.

* `results/KEY.json`: one file per finished model, written whole by the process that finished it;
* `models/NAME-KEY8/`: its output folder, as `secateurs run` writes it;
* `logs/NAME-KEY8.log`: what its process printed;
* `.secateurs/`: requests, stages and locks of the run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from secateurs.errors import UserError
from secateurs.files import read_form, write_text
from secateurs.report import BudgetRow, Ratios, Side

if TYPE_CHECKING:
    from secateurs.report import Report

__all__ = ["FAILED", "STATE", "Figures", "Job", "Result", "Status"]

Status = Literal["pass", "fail", "undecided", "error", "crashed", "timeout", "out-of-memory"]
FAILED: tuple[Status, ...] = ("error", "crashed", "timeout", "out-of-memory")
"""The statuses of models that have no verdict."""
STATE = ".secateurs"


def _below(text: str) -> str:
    """Refuse a path that leads out of the zoo's folder, or that a browser takes for something else than a file."""
    path = PureWindowsPath(text)
    if path.anchor or ".." in path.parts or ":" in text:
        raise ValueError("the path leads out of the folder")
    return text


Below = Annotated[str, AfterValidator(_below)]
"""A path relative to the zoo's folder, and below it."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Figures(_Form):
    """What a leaderboard shows of a report; the rest is in the model's folder."""

    baseline: Side
    candidate: Side
    ratios: Ratios
    budget: list[BudgetRow] = Field(default_factory=list)

    @classmethod
    def of(cls, report: Report) -> Figures:
        """Return the figures of a report."""
        return cls(baseline=report.baseline, candidate=report.candidate, ratios=report.ratios, budget=report.budget)


class Result(_Form):
    """How one model ended.

    Attributes:
        schema_version: of this form.
        name: of the entry.
        key: the hash of everything that determines the result.
        status: the report's verdict, or how the model failed.
        kind: class of the error, where there was one.
        reasons: why the status is what it is; empty where everything passed.
        attempts: how many processes were started for it.
        seconds: from the start of its last process to its end, without waiting.
        work_seconds: of these, what the recipe took, without imports.
        waited_seconds: that it waited for its turn to measure.
        peak_rss_bytes: largest resident set of its process.
        timeout: the limit it ran under, seconds.
        memory_mib: the limit it ran under; None is none.
        recipe: the recipe's file.
        folder: its output folder, relative to the zoo's.
        log: what its process printed, relative to the zoo's folder.
        figures: of its report, where there is one.
    """

    schema_version: Literal[1] = 1
    name: str
    key: str
    status: Status
    kind: str | None = None
    reasons: list[str] = Field(default_factory=list)
    attempts: int = 1
    seconds: float | None = None
    work_seconds: float | None = None
    waited_seconds: float | None = None
    peak_rss_bytes: int | None = None
    timeout: float
    memory_mib: int | None = None
    recipe: str
    folder: Below
    log: Below
    figures: Figures | None = None


class Job(_Form):
    """One model to run: all that its process has to know, on whatever machine.

    Attributes:
        name: of the entry.
        key: of the result.
        recipe: resolved, as YAML.
        source: the recipe's file.
        output: the zoo's folder, absolute.
        directory: the working directory.
        environment: what code and libraries said where the zoo was started.
        timeout: seconds.
        memory_mib: MiB, or None.
        retries: after crashes.
        threads: of torch.
        attempt: number of this process, from 1.
    """

    name: str
    key: str
    recipe: str
    source: str
    output: Path
    directory: Path
    environment: str
    timeout: float
    memory_mib: int | None
    retries: int
    threads: int
    attempt: int = 1

    @property
    def label(self) -> str:
        """Name of its folder and log."""
        return f"{self.name}-{self.key[:8]}"

    @property
    def folder(self) -> Path:
        """Output folder of the run."""
        return self.output / "models" / self.label

    @property
    def log(self) -> Path:
        """Where its process prints."""
        return self.output / "logs" / f"{self.label}.log"

    @property
    def lock(self) -> Path:
        """Held by the process that works on it."""
        return self.output / STATE / f"{self.key}.lock"

    @property
    def request(self) -> Path:
        """This job as a file."""
        return self.output / STATE / f"{self.key}.job.json"

    @property
    def result_path(self) -> Path:
        """The result's file."""
        return self.output / "results" / f"{self.key}.json"

    @property
    def stage_path(self) -> Path:
        """Where its process says what it is doing."""
        return self.output / STATE / f"{self.key}.stage"

    @property
    def stage(self) -> str:
        """What its process is doing; empty before it starts."""
        try:
            return self.stage_path.read_text(encoding="utf-8")
        except OSError:
            return ""

    def result(self) -> Result | None:
        """Return the result that is on the disk; None where there is none that can be read."""
        with contextlib.suppress(UserError):
            found = read_form(self.result_path, Result, "result of a model")
            return found if found.key == self.key else None
        return None

    def settled(self, *, retry_failed: bool = False) -> bool:
        """Return whether nothing is left to do: a limit that has changed since it was broken is tried again."""
        found = self.result()
        if found is None or (retry_failed and found.status in FAILED):
            return False
        if found.status == "timeout":
            return found.timeout == self.timeout
        return found.status != "out-of-memory" or found.memory_mib == self.memory_mib

    def ended(self, status: Status, reasons: list[str], **more: object) -> Result:
        """Return the result of this job."""
        values: dict[str, object] = {
            "name": self.name,
            "key": self.key,
            "status": status,
            "reasons": reasons,
            "attempts": self.attempt,
            "timeout": self.timeout,
            "memory_mib": self.memory_mib,
            "recipe": self.source,
            "folder": str(self.folder.relative_to(self.output)),
            "log": str(self.log.relative_to(self.output)),
        }
        return Result.model_validate(values | more)

    def keep(self, result: Result) -> None:
        """Write the result, whole or not at all."""
        write_text(self.result_path, result.model_dump_json(indent=2) + "\n")
