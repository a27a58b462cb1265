"""The pipeline: runs passes, certifies and mends what they propose, and remembers everything.

`run_passes` is the heart of both faces: `secateurs.script` for a script, `secateurs.runner` for a recipe. A pass proposes a plan; the
pipeline applies it to a copy, keeps what is certified, refits towards the network before the edits, recovers, and lets validation accept or
reject the round.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from secateurs.attention import DescribeAttention
from secateurs.blocks import Describe
from secateurs.certificate import keep_certified
from secateurs.changes import changes
from secateurs.data import Dataset, Roles
from secateurs.errors import DataError, RecipeError, SecateursError
from secateurs.forward import predict
from secateurs.interfaces import CostModel, ProgressEvent, WidthMultiple
from secateurs.manager import Manager
from secateurs.outputs import kl_divergence
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.plan import Plan
from secateurs.recalibration import recalibrate
from secateurs.recipe import PassSpec, settings_from
from secateurs.recovery import train
from secateurs.refit import refit
from secateurs.report import Certificate, PassRecord, Skipped
from secateurs.settings import RecoverySettings
from secateurs.surgery import applied
from secateurs.training_mode import check_trained_network

__all__ = ["Outcome", "Session", "build_pass", "recover", "run_passes"]

MAX_ROUNDS = 1000
"""Rounds after which a pass that never stops proposing is stopped."""


@dataclass(frozen=True)
class Session:
    """What stays the same for all passes of a run.

    Attributes:
        baseline: the network before all passes.
        roles: the data.
        evaluate: metric on validation data, higher is better; None without labels.
        cost_models: by name, bound to the first target where they depend on one.
        width_multiple: what the first target likes.
        recovery: settings of the training that passes may ask for.
        describe_blocks: the hook.
        describe_attention: the hook.
        progress: called with every step.
        seed: of everything random.
    """

    baseline: nn.Module
    roles: Roles
    cost_models: Callable[[str], CostModel]
    width_multiple: Callable[[], WidthMultiple] = field(default=lambda: WidthMultiple(1, "there is no target"))
    evaluate: Callable[[nn.Module], float] | None = None
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    describe_blocks: Describe | None = None
    describe_attention: DescribeAttention | None = None
    progress: Callable[[ProgressEvent], None] = field(default=lambda _: None)
    seed: int = 0

    def context(self, model: nn.Module) -> Context:
        """Return what a pass sees of `model`."""
        return Context(
            model=model,
            baseline=self.baseline,
            calibration=self.roles.calibration,
            training=self.roles.training,
            validation=self.roles.validation,
            evaluate=self.evaluate,
            cost_models=self.cost_models,
            width_multiple=self.width_multiple,
            describe_blocks=self.describe_blocks,
            describe_attention=self.describe_attention,
            progress=self.progress,
            seed=self.seed,
        )

    def held_out(self, most: int = 512) -> Dataset:
        """Return examples that statistics were not gathered on, where there are any."""
        source = self.roles.validation or self.roles.calibration
        return source.take(np.arange(min(most, len(source))))


@dataclass(frozen=True)
class Outcome:
    """Where a run stands.

    Attributes:
        model: the network so far.
        plan: the edits from the baseline to it.
        records: one per finished pass.
        shortfalls: promises that were not kept, for example targets that were missed.
        validation: what `Session.evaluate` says of the network, where it is known.
    """

    model: nn.Module
    plan: Plan = field(default_factory=Plan)
    records: tuple[PassRecord, ...] = ()
    shortfalls: tuple[str, ...] = ()
    validation: float | None = None


def build_pass(spec: PassSpec, manager: Manager) -> Pass:
    """Return the configured pass of a recipe's item.

    Raises:
        RecipeError: an unknown pass or option, or a value that is not allowed.
    """
    entry = manager.registries.passes[spec.name]
    settings = settings_from(entry.load_settings(), spec.options, f"passes.{spec.name}")
    return entry.load()(settings)


def run_passes(
    session: Session,
    passes: Sequence[Pass],
    manager: Manager,
    start: Outcome | None = None,
    after: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Run passes one after the other.

    Args:
        session: network, data and hooks.
        passes: in order.
        manager: whose hooks are told before and after each pass.
        start: where an interrupted run stood; the passes that it has records of are left out.
        after: called with where the run stands after each pass.
    """
    outcome = start or Outcome(session.baseline)
    for step in passes[len(outcome.records) :]:
        manager.hook.secateurs_before_pass(name=step.name, model=outcome.model)
        outcome = _run_pass(session, step, outcome)
        manager.hook.secateurs_after_pass(name=step.name, model=outcome.model, record=outcome.records[-1])
        if after is not None:
            after(outcome)
    return outcome


_RAN = "_secateurs_ran"
"""Attribute of a pass that has been run: it remembers its rounds."""


@dataclass
class _Tally:
    """What one pass did so far."""

    plan: Plan = field(default_factory=Plan)
    skipped: dict[tuple[str, str], Skipped] = field(default_factory=dict)
    certificate: Certificate | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def skip(self, items: Iterable[Skipped]) -> None:
        self.skipped |= {(item.where, item.reason): item for item in items}

    def certify(self, certificate: Certificate | None) -> None:
        """Keep the certificate with the largest relative difference."""
        if certificate is not None and (self.certificate is None or certificate.share >= self.certificate.share):
            self.certificate = certificate


def _run_pass(session: Session, step: Pass, outcome: Outcome) -> Outcome:
    began = time.perf_counter()
    if getattr(step, _RAN, False):
        raise RecipeError(
            f"this pass {step.name!r} has been run before, and one serves one run; make a new one, or give its name and options."
        )
    setattr(step, _RAN, True)
    step.requires(session.context(outcome.model))
    entry = current = outcome.model
    reference = outcome.validation
    if reference is None and session.evaluate is not None:
        reference = session.evaluate(entry)
    latest = reference
    sign = getattr(session.evaluate, "sign", 1.0)  # the report has the metric in its own direction
    tally = _Tally()
    for _ in range(MAX_ROUNDS):
        session.progress(ProgressEvent(step.name, len(tally.rounds), len(tally.rounds) + 1, "looking for edits"))
        proposal = step.propose(replace(session.context(current), entry=entry, done=tally.plan))
        tally.skip(proposal.skipped)
        # The first round describes the network as the pass found it; later rounds must not overwrite that.
        tally.details = {**proposal.details, **tally.details}
        if not proposal.plan:
            break
        certified = keep_certified(current, proposal.plan, session.roles.calibration)
        tally.skip(certified.vetoed)
        if not certified.plan:
            step.answer(False)
            continue
        total = tally.plan + certified.plan
        pruned = _applied(session, current, certified.plan, trains=proposal.recovery_epochs > 0)
        candidate, mended = _mend(session, step.name, pruned, entry, total, proposal)
        accepted, value = _judge(session, proposal, candidate, reference)
        shown = None if value is None else sign * value
        tally.rounds.append({"edits": certified.plan.removals, "accepted": accepted, "validation": shown, **mended})
        step.answer(accepted)
        if accepted:
            current, tally.plan, latest = candidate, total, value
            if not certified.plan.removes:
                entry = candidate  # the same function in another form: what refit compares with, layer by layer
            tally.certify(certified.certificate)
    else:
        raise SecateursError(
            f"pass {step.name!r} proposed {MAX_ROUNDS} rounds without coming to an end; report this to its author."
        )
    missed = step.shortfall(session.context(current))
    record = PassRecord(
        name=step.name,
        settings=step.settings.model_dump(mode="json"),
        edits=tally.plan.removals,
        skipped=list(tally.skipped.values()),
        certificate=tally.certificate,
        seconds=time.perf_counter() - began,
        details={
            **tally.details,
            **changes(current, tally.plan),
            "validation_before": None if reference is None else sign * reference,
            "rounds": tally.rounds,
        },
    )
    shortfalls = outcome.shortfalls if missed is None else (*outcome.shortfalls, missed)
    return Outcome(current, outcome.plan + tally.plan, (*outcome.records, record), shortfalls, latest)


def _applied(session: Session, model: nn.Module, plan: Plan, *, trains: bool) -> nn.Module:
    """Return the network after a plan; where it will be trained, whether it can be is checked before any more work."""
    pruned = applied(model, plan)
    if (trains or session.recovery.epochs) and session.roles.training is not None:
        check_trained_network(pruned, model, plan, session.roles.training)
    return pruned


def _mend(
    session: Session, name: str, candidate: nn.Module, dense: nn.Module, plan: Plan, proposal: Proposal
) -> tuple[nn.Module, dict[str, Any]]:
    """Refit, recalibrate and train a pruned network, each only as far as the proposal asks and the held-out divergence agrees."""
    held_out = session.held_out()
    reference = predict(dense, held_out)
    before = kl_divergence(reference, predict(candidate, held_out))
    done: dict[str, Any] = {"kl_pruned": before}
    if proposal.consumers:
        refitted = copy.deepcopy(candidate)

        def tell(number: int, total: int) -> None:
            session.progress(ProgressEvent(f"{name}: refit", number, total, proposal.consumers[number]))

        refit(
            refitted,
            dense,
            plan,
            proposal.consumers,
            session.roles.calibration,
            ridge=proposal.ridge,
            seed=session.seed,
            progress=tell,
        )
        after = kl_divergence(reference, predict(refitted, held_out))
        done["kl_refitted"] = after
        if after < before:
            candidate, before = refitted, after
    if proposal.recalibrate:
        done["recalibrated"] = recalibrate(candidate, dense, session.roles.calibration, held_out)
    if proposal.recovery_epochs:
        epochs = session.recovery.model_copy(update={"epochs": proposal.recovery_epochs})
        with _only(candidate, proposal.trainable):
            recover(session, candidate, epochs, name)
    return candidate, done


@contextmanager
def _only(model: nn.Module, trainable: Sequence[str]) -> Iterator[None]:
    """Let only the parameters of some modules be trained for the length of a block; without names, all that may be."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for path in trainable for parameter in model.get_submodule(path).parameters()}
    try:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted and (not trainable or id(parameter) in chosen))
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def recover(
    session: Session,
    model: nn.Module,
    settings: RecoverySettings,
    name: str = "recovery",
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train `model` in place on the training role, towards labels and, if asked, the baseline; `checkpoint` as in `train`.

    Raises:
        DataError: there is no training role.
    """
    if session.roles.training is None:
        raise DataError(
            f"{name} asks for training, and there is no training data; give a `training` role or labelled calibration data."
        )
    return train(
        model,
        session.roles.training,
        settings,
        teacher=session.baseline if settings.distill else None,
        evaluate=session.evaluate,
        seed=session.seed,
        progress=lambda done, total, word: session.progress(ProgressEvent(name, done, total, word)),
        checkpoint=checkpoint,
    )


def _judge(
    session: Session, proposal: Proposal, candidate: nn.Module, reference: float | None
) -> tuple[bool, float | None]:
    if session.evaluate is None:
        return True, None
    value = session.evaluate(candidate)
    if proposal.tolerance is None or reference is None:
        return True, value
    return reference - value <= proposal.tolerance + 1e-9, value
