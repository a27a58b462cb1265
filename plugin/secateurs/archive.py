"""The finished trials of a search, on disk where there is a folder, so that an interrupted search goes on after its last one.

Every trial leaves its plan and its record; weights are kept of the leading one alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel
from torch import nn

from secateurs import checkpoint, processes
from secateurs.errors import SecateursError
from secateurs.files import parse_form, read_file, write_text
from secateurs.pipeline import Outcome
from secateurs.plan import Plan
from secateurs.report import PassRecord, Trial
from secateurs.strategy import Answer

__all__ = ["Archive", "leader", "plan_name"]


class _Finished(BaseModel):
    """What is kept of a trial beside its plan."""

    trial: Trial
    answer: Answer
    records: list[PassRecord]
    shortfalls: list[str]


def leader(trials: list[Trial]) -> Trial | None:
    """Return the cheapest accepted trial, or else the one of the smallest drop; None where none removes anything.

    Of two at the same cost, the one of the better metric leads; then the earlier one.
    """
    removing = [trial for trial in trials if trial.edits]
    accepted = [trial for trial in removing if trial.accepted]
    if accepted:
        return min(accepted, key=lambda trial: (trial.cost_ratio, _drop(trial)))
    return min(removing, key=lambda trial: (_drop(trial), trial.cost_ratio), default=None)


def plan_name(trial: Trial) -> str:
    """Return the name of the file that holds the plan of a trial."""
    return f"trial-{trial.number:02}.json"


def _drop(trial: Trial) -> float:
    return float("inf") if trial.drop is None else trial.drop


class Archive:
    """Trials in order, and where the leading one led.

    Args:
        folder: of the files; None keeps everything in memory.
        baseline: from which networks are rebuilt.
    """

    def __init__(self, folder: Path | None, baseline: nn.Module) -> None:
        self.trials: list[Trial] = []
        self._folder, self._baseline = folder, baseline
        self._leading: tuple[int, Outcome] | None = None
        # What the main process finds at the start holds for all: a slower one must not find what was added since.
        found = processes.from_main(self._read, write=json.dumps, read=json.loads)
        self._found = [parse_form(text, _Finished, f"trial {number}") for number, text in enumerate(found, 1)]

    def replayed(self, blocks: int, target: float | None) -> Answer | None:
        """Return the answer of the next trial if it was finished before, and take it over; None if it has to be made.

        Raises:
            SecateursError: another candidate was tried in its place.
        """
        number = len(self.trials)
        if number >= len(self._found):
            return None
        known = self._found[number]
        if (known.trial.blocks, known.trial.target) != (blocks, target):
            raise SecateursError(
                f"the trials kept in {str(self._folder)!r} are those of another search; start anew with `--overwrite`."
            )
        self.trials.append(known.trial)
        return known.answer

    def add(self, trial: Trial, answer: Answer, outcome: Outcome) -> None:
        """Keep a trial; the file that names it is written last."""
        self.trials.append(trial)
        before, leading = self._leading, leader(self.trials) is trial
        if leading:
            self._leading = (trial.number, outcome)
        if self._folder is None or not processes.is_main():
            return
        here = self._path(trial.number)
        here.mkdir(parents=True, exist_ok=True)
        if leading:
            checkpoint.save_weights(outcome.model, here / checkpoint.WEIGHTS)
        outcome.plan.save(here / checkpoint.PLAN)
        kept = _Finished(trial=trial, answer=answer, records=list(outcome.records), shortfalls=list(outcome.shortfalls))
        write_text(here / "trial.json", kept.model_dump_json())
        if leading and before is not None:
            (self._path(before[0]) / checkpoint.WEIGHTS).unlink(missing_ok=True)

    def outcome(self) -> Outcome:
        """Return where the leading trial led; the baseline where no trial removes anything."""
        best = leader(self.trials)
        if best is None:
            return Outcome(self._baseline)
        if self._leading is not None and self._leading[0] == best.number:
            return self._leading[1]
        known, here = self._found[best.number - 1], self._path(best.number)
        model = checkpoint.load(here, build=self._baseline)
        return Outcome(model, Plan.load(here / checkpoint.PLAN), tuple(known.records), tuple(known.shortfalls))

    def publish(self, folder: Path) -> None:
        """Write the plans of all trials into `folder`, as `trial-01.json` and so on."""
        for trial in self.trials:
            write_text(folder / plan_name(trial), Plan.load(self._path(trial.number) / checkpoint.PLAN).to_json())

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:02}"

    def _read(self) -> list[str]:
        """Return the records of the trials that are finished, in order."""
        texts: list[str] = []
        while self._folder is not None and (file := self._path(len(texts) + 1) / "trial.json").exists():
            texts.append(read_file(file, "record of a trial").decode("utf-8", errors="replace"))
        return texts
