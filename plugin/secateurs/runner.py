"""Running a recipe: from the YAML file to the whole output folder.

Everything that a user may have got wrong is checked before anything is written. Progress is kept in `.secateurs/` inside the output folder, so
that an interrupted run resumes after its last finished pass or trial; the files that people read appear whole, `report.json` last.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from secateurs import checkpoint, cost, processes
from secateurs.card import model_card
from secateurs.data import Dataset, resolve_roles
from secateurs.devices import fill_in
from secateurs.errors import DataError, ModelError, RecipeError, UserError, unknown_name
from secateurs.files import read_form, refuse_links
from secateurs.forward import call, inference, output_tensors, trimming
from secateurs.interfaces import Converter, Exporter, Metric, ProgressEvent, Target, width_multiple
from secateurs.judging import Validation
from secateurs.manager import Manager
from secateurs.passes.base import Pass
from secateurs.pipeline import Outcome, Session, build_pass, recover, run_passes
from secateurs.plan import Plan
from secateurs.recipe import Recipe, load_recipe, settings_from
from secateurs.recovery import check_settings
from secateurs.report import PassRecord, Report, Trial, write_text
from secateurs.search import Search, prepare_search
from secateurs.settings import TargetSettings
from secateurs.shipping import Shipping
from secateurs.sources import load_role

__all__ = ["OUTPUTS", "PLANS", "Prepared", "Pruned", "dry_run", "prepare", "run"]

OUTPUTS = (
    "report.json",
    "report.html",
    "recipe.yaml",
    "plan.json",
    "model.safetensors",
    "model.onnx",
    "model.onnx.json",
    "baseline.onnx",
    "baseline.onnx.json",
    "README.md",
)
"""The files of every output folder."""
VARIANTS = ("{}.onnx.data", "{}.edge.*", "{}.quantised.*", "config.json")
"""What may lie beside `model.onnx` and `baseline.onnx`, by the first part of their names; the last makes `from_pretrained` fail there."""
PLANS = "plans"
"""The folder in it of the plans that a search tried."""
STATE = ".secateurs"


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
    model = loader(spec.value, arguments=spec.arguments, weights=spec.weights, folder=recipe.folder).eval()
    example = data.take(range(min(2, len(data))))
    try:
        with inference(model):
            outputs = output_tensors(call(model, example))
    except Exception as error:  # whatever a user's network raises on the user's data
        shapes = {name: tuple(array.shape[1:]) for name, array in example.inputs.items()}
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the network does not run on the calibration data (shapes per example {shapes}): {message}."
        ) from error
    if not outputs:
        raise ModelError(
            "the network returns no floating-point tensor; return the prediction as a tensor, tuple or mapping."
        )
    if not all(bool(value.isfinite().all()) for value in outputs):
        raise ModelError(
            "the network returns NaN or infinite values on calibration data; check its weights and the normalisation."
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
    finished = _on_main(lambda: _open_folder(output, digest, resume=resume, overwrite=overwrite))
    if finished is not None:
        return finished
    pruned = _prune(prepared, output, digest)
    outcome = pruned.outcome
    model = copy.deepcopy(outcome.model)
    if recipe.recovery.epochs and outcome.plan.removes:
        recover(session, model, recipe.recovery, checkpoint=output / STATE / "recovery")
    report = _on_main(lambda: _finish(prepared, outcome, model, output))
    assert report is not None
    report.notes += session.roles.notes
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
        (output / STATE / "state.json").unlink(missing_ok=True)  # first: it must never name what is gone
        shutil.rmtree(output / STATE, ignore_errors=True)
    return report


def _prune(prepared: Prepared, output: Path, digest: str) -> Pruned:
    """Run the passes, or the search, from where an interrupted run stood."""
    session = prepared.session
    if prepared.search is not None:
        _write_state(output, digest, Outcome(session.baseline))
        found = prepared.search.run(output / STATE / "trials")
        return Pruned(found.outcome, found.trials(output / PLANS))
    start = _load_state(output, digest, session)
    outcome = run_passes(
        session, prepared.passes, prepared.manager, start, after=lambda done: _save_state(output, digest, done)
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


def _open_folder(output: Path, digest: str, *, resume: bool, overwrite: bool) -> Report | None:
    """Make the output folder ready; return the report if the run of this digest has been finished in it and is resumed."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"the output {str(output)!r} is not a plain folder; choose another with `--output`.")
    refuse_links(output)
    content = sorted(path.name for path in output.iterdir()) if output.exists() else []
    state = output / STATE / "state.json"
    if content and not (resume or overwrite):
        listed = ", ".join(content[:5]) + (", ..." if len(content) > 5 else "")
        raise UserError(
            f"the output folder {str(output)!r} is not empty ({listed}); give `--resume`, `--overwrite` or another `--output`."
        )
    begun = state.exists() or any(
        name != STATE for name in content
    )  # else it was killed before it had said whose folder this is
    if resume and begun:
        known = _digest_of(state) if state.exists() else _digest_of_finished(output)
        if known != digest:
            raise UserError(
                f"the output folder {str(output)!r} holds a run of another recipe, or its weights, its data or the code of its factory have "
                "changed; `--resume` needs all of them the same. Give `--overwrite` or another `--output`."
            )
        if not state.exists():
            found = Report.load(output / "report.json")
            shutil.rmtree(output / STATE, ignore_errors=True)
            return found
    if overwrite and content:
        if not _holds_run(content):
            raise UserError(
                f"the output folder {str(output)!r} holds no run that `--overwrite` could replace, but {', '.join(content[:5])}"
                f"{', ...' if len(content) > 5 else ''}; its files may be yours. Empty it, or choose another with `--output`."
            )
        _clear(output)
    for left in output.glob(".*.partial"):  # of a process that was killed while it wrote
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    try:
        (output / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the output folder {str(output)!r}: {error.strerror}; choose another with `--output`."
        ) from None
    return None


def _holds_run(content: Sequence[str]) -> bool:
    """Tell whether the names in a folder are those of a run: one that is under way keeps its state there, a finished one its recipe."""
    return STATE in content or {"report.json", "recipe.yaml"} <= set(content)


def _clear(output: Path) -> None:
    """Remove the files of an earlier run; the folder of its state stays, so that one killed here still shows whose folder this is."""
    (output / STATE).mkdir(exist_ok=True)
    (output / STATE / "state.json").unlink(missing_ok=True)  # first: it must never name what is gone
    for name in OUTPUTS:
        (output / name).unlink(missing_ok=True)
    for variant in (pattern.format(stem) for pattern in VARIANTS for stem in ("model", "baseline")):
        for path in output.glob(variant):
            path.unlink()
    for plan in (output / PLANS).glob("trial-*.json"):
        plan.unlink()
    for mark in output.glob(f"*/{checkpoint.MARK}"):
        shutil.rmtree(mark.parent)
    for left in (output / STATE).iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


class _State(BaseModel):
    """How far the passes are, and of which recipe."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")

    digest: str
    finished: int = Field(ge=0)
    records: list[PassRecord]
    shortfalls: list[str]


def _digest_of(state: Path) -> str | None:
    try:
        return read_form(state, _State, "state of a run").digest
    except UserError:
        return None


def _digest_of_finished(output: Path) -> str | None:
    """Return the digest of the finished run in a folder, or None where there is none; a report without one stands for the files of today."""
    if not (output / "report.json").exists() or not (output / "recipe.yaml").exists():
        return None
    return Report.load(output / "report.json").digest or load_recipe(output / "recipe.yaml").digest(without=output)


def _save_state(output: Path, digest: str, outcome: Outcome) -> None:
    """Keep what a resumed run needs; the file that names the state is written last."""
    if processes.is_main():
        checkpoint.save(outcome.model, outcome.plan, output / STATE / f"pass{len(outcome.records)}")
    _write_state(output, digest, outcome)


def _write_state(output: Path, digest: str, outcome: Outcome) -> None:
    """Write whose state the folder holds, and how far the passes are."""
    if not processes.is_main():
        return
    body = _State(
        digest=digest,
        finished=len(outcome.records),
        records=list(outcome.records),
        shortfalls=list(outcome.shortfalls),
    )
    write_text(output / STATE / "state.json", body.model_dump_json())


def _load_state(output: Path, digest: str, session: Session) -> Outcome:
    state = output / STATE / "state.json"
    if not state.exists() or _digest_of(state) != digest:
        return Outcome(session.baseline)
    body = read_form(state, _State, "state of a run")
    folder = output / STATE / f"pass{body.finished}"
    return Outcome(
        checkpoint.load(folder, build=session.baseline),
        Plan.load(folder / "plan.json"),
        tuple(body.records),
        tuple(body.shortfalls),
    )
