"""Running a recipe: from the YAML file to the whole output folder.

Everything that a user may have got wrong is checked before anything is written. Progress is kept in `.secateurs/` inside the output folder, so
that an interrupted run resumes after its last finished pass or trial; the files that people read appear whole, `report.json` last.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs import checkpoint, cost, processes
from secateurs.card import model_card
from secateurs.data import Dataset, order_notes, resolve_roles
from secateurs.devices import fill_in
from secateurs.entry import copied, outputs_on, plain_network
from secateurs.errors import ModelError, RecipeError, unknown_name
from secateurs.files import write_text
from secateurs.forward import leaves, logits, output_tensors, trimming
from secateurs.interfaces import Converter, Exporter, Metric, ProgressEvent, Target, width_multiple
from secateurs.judging import Validation
from secateurs.manager import Manager
from secateurs.passes.base import Pass
from secateurs.pipeline import Outcome, Session, build_pass, recover, run_passes
from secateurs.recipe import Recipe, settings_from
from secateurs.recovery import check_settings
from secateurs.report import Report, Trial
from secateurs.run_folder import PLANS, STATE, close_folder, load_state, open_folder, save_state, write_state
from secateurs.search import Search, prepare_search
from secateurs.settings import TargetSettings
from secateurs.shipping import Shipping
from secateurs.sources import load_role
from secateurs.training_mode import check_training_mode, training_notes

__all__ = ["Prepared", "Pruned", "dry_run", "prepare", "run"]


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every part was found and checked.

    Attributes:
        recipe: as given, resolved.
        session: network, data, metric, hooks.
        passes: configured.
        evaluation: the examples of the verdict, or None.
        metric: of the recipe.
        exporter: of the recipe.
        edge: fixes the shapes of a file, where the recipe asks for it.
        quantiser: quantises a file, where the recipe asks for it.
        targets: with their settings; each said that it can measure here.
        manager: of the plugins.
        search: where a pass leaves its target open.
    """

    recipe: Recipe
    session: Session
    passes: list[Pass]
    evaluation: Dataset | None
    metric: Metric
    exporter: Exporter
    targets: list[tuple[Target, TargetSettings]]
    manager: Manager
    search: Search | None = None
    edge: Converter | None = None
    quantiser: Converter | None = None

    @property
    def shipping(self) -> Shipping:
        """How the files are made and judged."""
        return Shipping(
            self.recipe, self.exporter, self.edge, self.quantiser, self.targets, self.evaluation, self.metric
        )


@dataclass(frozen=True)
class Pruned:
    """Where the passes of a recipe led.

    Attributes:
        outcome: of the passes, or of the chosen trial of a search.
        trials: of the search; none where there was no search.
    """

    outcome: Outcome
    trials: list[Trial]


def prepare(recipe: Recipe, manager: Manager, progress: Callable[[ProgressEvent], None] | None = None) -> Prepared:
    """Look up and check every part of a recipe; nothing is written.

    Raises:
        UserError: something in the recipe is wrong; the message says what and what is allowed.
    """
    registries = manager.registries
    budget, filled = fill_in(recipe.budget, recipe.targets, registries.devices)
    recipe = recipe.model_copy(update={"budget": budget, "targets": filled})
    passes = [build_pass(spec, manager) for spec in recipe.passes]
    metric = registries.metrics[recipe.metric].make()
    exporter = _exporter(recipe, manager)
    edge, quantiser = _converters(recipe, manager)
    targets = [(registries.targets[settings.provider].make(), settings) for settings in recipe.targets]
    for target, settings in targets:
        target.check(settings)
    sources = {role: load_role(recipe, role, manager) for role in recipe.data}
    trains = recipe.recovery.epochs > 0 or any(getattr(step.settings, "recovery_epochs", 0) for step in passes)
    roles = resolve_roles(
        sources,
        {role: spec.samples for role, spec in recipe.data.items()},
        recipe.seed,
        cut=("training", "validation") if trains else ("validation",),
    )
    if roles.evaluation is None and recipe.budget.accuracy_drop is not None:
        raise RecipeError(
            "`budget.accuracy_drop` needs an `evaluation` role in `data`; it is never cut from calibration."
        )
    model = _load_model(recipe, manager, roles.calibration)
    roles = trimming(model, roles)
    evaluate = None
    if roles.validation is not None and roles.validation.labels is not None:
        evaluate = Validation(metric, roles.validation)
    if trains:
        check_settings(recipe.recovery, model, evaluated=evaluate is not None)
        check_training_mode(model, roles.training or roles.calibration)
    session = Session(
        baseline=model,
        roles=roles,
        cost_models=lambda name: cost.on_target(registries.cost_models[name].load(), recipe.targets[0]),
        width_multiple=lambda: width_multiple(*targets[0]),
        evaluate=evaluate,
        recovery=recipe.recovery,
        describe_blocks=lambda network: manager.hook.secateurs_describe_blocks(model=network),
        describe_attention=lambda module: manager.hook.secateurs_describe_attention(module=module),
        progress=progress or (lambda _: None),
        seed=recipe.seed,
    )
    latency = session.cost_models("latency") if "latency" in registries.cost_models else None
    search = prepare_search(session, passes, manager, recipe.budget, recipe.search, latency)
    return Prepared(
        recipe, session, passes, roles.evaluation, metric, exporter, targets, manager, search, edge, quantiser
    )


def _exporter(recipe: Recipe, manager: Manager) -> Exporter:
    """Return the recipe's exporter, made with its options where it takes any."""
    entry, options = manager.registries.exporters[recipe.export.exporter], recipe.export.options
    settings = settings_from(entry.load_settings(), options, "export.options")
    if settings is None:
        return entry.make()
    make: Any = entry.load()
    exporter: Exporter = make(settings)
    return exporter


def _converters(recipe: Recipe, manager: Manager) -> tuple[Converter | None, Converter | None]:
    """Return what fixes shapes and what quantises, each where the recipe asks for it."""
    known, quantise = manager.registries.converters, recipe.quantise
    edge = None if recipe.export.edge is None else known["fixed-shapes"].make()
    if quantise is None:
        return edge, None
    if "evaluation" not in recipe.data:
        raise RecipeError(
            "`quantise` needs an `evaluation` role in `data`: a quantised file does not do exactly what the network does, so that only "
            "accuracy can judge it."
        )
    modes = [entry.name.removeprefix("quantise-") for entry in known if entry.name.startswith("quantise-")]
    if quantise.mode not in modes:
        raise RecipeError("`quantise.mode`: " + unknown_name("mode", quantise.mode, modes))
    return edge, known[f"quantise-{quantise.mode}"].make()


def _load_model(recipe: Recipe, manager: Manager, data: Dataset) -> nn.Module:
    spec = recipe.model
    torch.manual_seed(recipe.seed)
    loader = manager.registries.models[spec.loader].load()
    model = loader(spec.value, arguments=spec.arguments, weights=spec.weights, folder=recipe.folder)
    model = plain_network(model).eval()
    returned = outputs_on(model, data)
    outputs = output_tensors(returned)
    copied(model)  # what passes do, they do on copies
    checkpoint.saved_tensors(model)  # refuses now what could not be saved at the end
    if not outputs:
        raise ModelError(
            "the network returns no floating-point tensor; return the prediction as a tensor, tuple or mapping."
        )
    if not all(bool(value.isfinite().all()) for value in outputs):
        raise ModelError(
            "the network returns NaN or infinite values on calibration data; check its weights and the normalisation."
        )
    if leaves(returned)[0] is not logits(returned):
        raise ModelError(
            "the first thing that the network returns is not its prediction, and an exported file is judged by its first output; return the "
            "prediction (the entry `logits` where there is one, else the first floating-point tensor) first."
        )
    return model


# --- the run ----------------------------------------------------------------------------------------------------------------------------


def run(prepared: Prepared, output: Path, *, resume: bool = False, overwrite: bool = False) -> Report:
    """Run a recipe and write the whole output folder.

    Of several processes, all run the passes and share the training; the main one writes and measures, and all return its report.

    Args:
        prepared: from `prepare`.
        output: the folder; new or empty, unless `resume` or `overwrite` says otherwise.
        resume: go on after the last finished pass or trial of the same recipe; a finished run is read back.
        overwrite: replace the files of an earlier run.

    Raises:
        UserError: the folder holds something else than an earlier run, or that of another recipe.
    """
    began = time.perf_counter()
    recipe, session = prepared.recipe, prepared.session
    digest = recipe.digest(without=output)
    finished = _on_main(lambda: open_folder(output, digest, resume=resume, overwrite=overwrite))
    if finished is not None:
        return finished
    pruned = _prune(prepared, output, digest)
    outcome = pruned.outcome
    model = copy.deepcopy(outcome.model)
    if recipe.recovery.epochs and outcome.plan.removes:
        recover(session, model, recipe.recovery, checkpoint=output / STATE / "recovery")
    report = _on_main(lambda: _finish(prepared, outcome, model, output))
    assert report is not None
    report.notes += [
        *session.roles.notes,
        *order_notes(session.baseline.forward, session.roles.calibration),
        *training_notes(model, session.baseline, outcome.plan, session.roles.calibration),
    ]
    report.passes = list(outcome.records)
    report.trials = pruned.trials
    report.digest = digest
    report.seconds = time.perf_counter() - began
    if processes.is_main():
        checkpoint.save(model, outcome.plan, output)
        write_text(output / "recipe.yaml", recipe.to_yaml())
        write_text(output / "README.md", model_card(report, recipe))
        write_text(output / "report.json", report.to_json())
        prepared.manager.hook.secateurs_after_run(report=report, folder=output)
        close_folder(output)
    return report


def _prune(prepared: Prepared, output: Path, digest: str) -> Pruned:
    """Run the passes, or the search, from where an interrupted run stood."""
    session = prepared.session
    if prepared.search is not None:
        write_state(output, digest, Outcome(session.baseline))
        found = prepared.search.run(output / STATE / "trials")
        return Pruned(found.outcome, found.trials(output / PLANS))
    start = load_state(output, digest, session)
    outcome = run_passes(
        session, prepared.passes, prepared.manager, start, after=lambda done: save_state(output, digest, done)
    )
    return Pruned(outcome, [])


def _on_main(make: Callable[[], Report | None]) -> Report | None:
    """Let the main process write or measure, and return what it found in every process."""
    return processes.from_main(
        make,
        write=lambda report: "" if report is None else report.to_json(),
        read=lambda text: Report.model_validate_json(text) if text else None,
    )


def dry_run(prepared: Prepared) -> Pruned:
    """Run the passes without recovery, export or measurement, and write nothing."""
    if prepared.search is not None:
        found = prepared.search.run()
        return Pruned(found.outcome, found.trials())
    return Pruned(run_passes(prepared.session, prepared.passes, prepared.manager), [])


def _finish(prepared: Prepared, outcome: Outcome, model: nn.Module, output: Path) -> Report:
    """Write the network in the forms that plugins know, and prove what is exported."""
    calibration = prepared.session.roles.calibration
    said = prepared.manager.hook.secateurs_save_model(
        model=model, plan=outcome.plan, example=calibration.take(range(min(2, len(calibration)))), folder=output
    )
    report = prepared.shipping.prove(prepared.session, outcome, model, output)
    report.notes += said
    return report
