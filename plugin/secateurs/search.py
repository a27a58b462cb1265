"""The search for the smallest network that keeps `budget.accuracy_drop`, in depth and width together.

Passes that leave their target open are aimed at one candidate after another (`secateurs.strategy`). Each trial runs the whole pipeline, so that
every plan is certified and refitted, and is judged on validation data, before any training at the end. The cheapest accepted trial wins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from secateurs import cost, processes
from secateurs.aims import Aims, Step, find_aims
from secateurs.archive import Archive, leader, plan_name
from secateurs.budget import Budget
from secateurs.errors import DataError, SecateursError
from secateurs.interfaces import CostModel, ProgressEvent
from secateurs.judging import Judge
from secateurs.manager import Manager
from secateurs.passes.base import Pass
from secateurs.pipeline import Outcome, Session, run_passes
from secateurs.report import Trial
from secateurs.settings import SearchSettings
from secateurs.strategy import Answer, Candidate, candidates

__all__ = ["Found", "Search", "prepare_search"]


@dataclass(frozen=True)
class Found:
    """What came of a search.

    Attributes:
        outcome: where the chosen trial led; where none was accepted, the one of the smallest drop, with that as a shortfall.
        archive: of all trials.
    """

    outcome: Outcome
    archive: Archive

    def trials(self, plans: Path | None = None) -> list[Trial]:
        """Return the records of all trials, in order.

        Args:
            plans: a folder for their plans, to which the records then refer; None writes none.
        """
        best = leader(self.archive.trials)
        if plans is not None and processes.is_main():
            self.archive.publish(plans)
        return [
            trial.model_copy(
                update={
                    "chosen": trial is best,
                    "plan": None if plans is None else f"{plans.name}/{plan_name(trial)}",
                }
            )
            for trial in self.archive.trials
        ]


def prepare_search(
    session: Session,
    passes: Sequence[Pass],
    manager: Manager,
    budget: Budget,
    settings: SearchSettings | None,
    latency: CostModel | None = None,
) -> Search | None:
    """Return the search that the passes need, with everything checked, or None where every pass has its target.

    Args:
        session: network, data and hooks.
        passes: in order.
        manager: whose hooks are told of every pass.
        budget: `accuracy_drop`, and `accuracy_confidence` where the drop is judged by its exact interval.
        settings: of the search, if it is asked for; None takes the defaults where one is needed.
        latency: predicts it, for the records of the trials; None leaves it out.

    Raises:
        RecipeError: a target is missing and there is no budget to search to, or the search cannot aim at what is asked.
        DataError: there are no labelled validation data.
    """
    chosen = settings or SearchSettings()
    aims = find_aims(passes, accuracy_drop=budget.accuracy_drop, cost=chosen.cost, asked=settings is not None)
    if aims is None:
        return None
    session.cost_models(chosen.cost)
    if session.evaluate is None:
        raise DataError(
            "the search decides on labelled validation data, and there are none; give calibration labels, or a `validation` role "
            "(in Python: `evaluate=`)."
        )
    return Search(session, aims, manager, Judge(budget, session.evaluate, session.baseline), chosen, latency)


class Search:
    """Tries candidates and remembers them.

    Args:
        session: network, data and hooks.
        aims: what is searched.
        manager: whose hooks are told of every pass.
        judge: of candidates.
        settings: of the search.
        latency: predicts it, for the records of the trials; None leaves it out.
    """

    def __init__(
        self,
        session: Session,
        aims: Aims,
        manager: Manager,
        judge: Judge,
        settings: SearchSettings,
        latency: CostModel | None = None,
    ) -> None:
        self.settings = settings
        self._session, self._aims, self._manager, self._judge = session, aims, manager, judge
        self._latency, self._latency_before = latency, 0.0
        self._whole: list[float] | None = None
        self._chain: list[tuple[tuple[int, float | None], Outcome]] = []

    def run(self, folder: Path | None = None) -> Found:
        """Run the search.

        Args:
            folder: where finished trials are kept, so that an interrupted search goes on; None keeps them in memory.
        """
        archive = Archive(folder, self._session.baseline)
        aims, most = self._aims, self.settings.trials
        asked = candidates(
            depth=aims.depth is not None, width=aims.width is not None, resolution=self.settings.resolution
        )
        candidate = next(asked)
        while len(archive.trials) < most:
            if not aims.steps(candidate):
                answer = Answer(1.0, accepted=True)  # the baseline itself
            else:
                number = len(archive.trials) + 1
                self._session.progress(ProgressEvent("search", number - 1, most, self._word(candidate)))
                answer = archive.replayed(candidate.blocks, candidate.target) or self._try(archive, number, candidate)
            try:
                candidate = asked.send(answer)
            except StopIteration:
                break
        return Found(self._leading(archive), archive)

    def _leading(self, archive: Archive) -> Outcome:
        """Return where the leading trial led, with a shortfall if it was not accepted."""
        outcome, best = archive.outcome(), leader(archive.trials)
        if best is not None and best.accepted:
            return outcome
        limit = (
            f"the search found no network that keeps `budget.accuracy_drop` {self._judge.limit:g} on validation data"
        )
        closest = (
            "" if best is None or best.drop is None else f"; the closest, trial {best.number}, loses {best.drop:.4f}"
        )
        more = "; allow a larger drop, or give the passes `recovery_epochs` or targets of their own"
        return replace(outcome, shortfalls=(*outcome.shortfalls, limit + closest + more))

    def _word(self, candidate: Candidate) -> str:
        parts = [f"{candidate.blocks} blocks" if self._aims.depth is not None else ""]
        parts += [f"{self.settings.cost} {candidate.target:.3f}" if candidate.target is not None else ""]
        return ", ".join(part for part in parts if part)

    def _try(self, archive: Archive, number: int, candidate: Candidate) -> Answer:
        """Make a trial, and keep it."""
        began = time.perf_counter()
        steps = self._aims.steps(candidate)
        outcome = self._outcome(steps)
        judged = self._judge(outcome.model, outcome.validation)
        reasons = [] if judged.reason is None else [judged.reason]
        ratio, macs, parameters = self._ratios(outcome.model)
        gone = candidate.blocks
        if gone:
            position = next(index for index, step in enumerate(steps) if step.position == self._aims.depth)
            gone = outcome.records[position].edits
        if gone < candidate.blocks:
            reasons.append(f"only {gone} of {candidate.blocks} blocks could go")
        if candidate.target is not None and ratio > candidate.target * (1 + 1e-9):
            reasons.append(f"the target was missed, by {ratio - candidate.target:.4f}: the rest could not be pruned")
        drop, pairs = judged.drop, judged.pairs
        trial = Trial(
            number=number,
            blocks=candidate.blocks,
            target=candidate.target,
            edits=outcome.plan.removals,
            cost_ratio=ratio,
            macs_ratio=macs,
            params_ratio=parameters,
            latency_ratio=self._latency_ratio(outcome.model),
            validation=judged.value,
            drop=None if drop is None else drop.value,
            drop_ci95=None if drop is None else drop.ci95,
            lost=None if pairs is None else pairs.lost,
            gained=None if pairs is None else pairs.gained,
            n=None if pairs is None else pairs.n,
            accepted=judged.reason is None,
            seconds=time.perf_counter() - began,
            reasons=reasons,
        )
        answer = Answer(ratio, trial.accepted, exhausted=gone < candidate.blocks)
        archive.add(trial, answer, outcome)
        return answer

    def _outcome(self, steps: Sequence[Step]) -> Outcome:
        """Run the passes of a candidate; those that it begins with like the candidate before are not run again."""
        shared = 0
        for (known, _), step in zip(self._chain, steps, strict=False):
            if known != (step.position, step.aim):
                break
            shared += 1
        del self._chain[shared:]
        outcome = self._chain[-1][1] if shared else Outcome(self._session.baseline, validation=self._judge.before)
        passes = [step.run for step in steps]
        for number in range(shared, len(steps)):
            done = run_passes(self._session, passes[: number + 1], self._manager, outcome)
            if steps[number].aim is not None:
                done = replace(done, shortfalls=outcome.shortfalls)  # nobody promised what was only tried
            outcome = done
            self._chain.append(((steps[number].position, steps[number].aim), outcome))
        return outcome

    def _ratios(self, model: nn.Module) -> tuple[float, float, float]:
        """Return candidate / baseline of the cost that is searched for, of MACs and of parameters."""
        if self._whole is None:
            self._whole = self._costs(self._session.baseline)
        pairs = zip(self._costs(model), self._whole, strict=True)
        cost_ratio, macs, parameters = (after / before if before else 1.0 for after, before in pairs)
        return cost_ratio, macs, parameters

    def _latency_ratio(self, model: nn.Module) -> float | None:
        """Return candidate / baseline of the predicted latency; None from the first network on that it cannot be told of."""
        if self._latency is None:
            return None
        example = self._session.context(model).example
        try:
            if not self._latency_before:
                self._latency_before = sum(self._latency(self._session.baseline, example).values())
            return sum(self._latency(model, example).values()) / self._latency_before
        except SecateursError:  # the network may be right and only not exportable; the proof says so
            self._latency = None
            return None

    def _costs(self, model: nn.Module) -> list[float]:
        example = self._session.context(model).example
        counts = (self._session.cost_models(self.settings.cost), cost.macs, cost.parameters)
        return [sum(count(model, example).values()) for count in counts]
