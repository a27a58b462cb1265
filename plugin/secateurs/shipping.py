"""From networks to files that ship: export, quantisation, variants with fixed shapes, and the proof over all of them.

Where a recipe quantises, the file that ships is the pruned and quantised one, and the budget judges that. Four files
then stand in one table: dense, pruned, quantised, and both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from secateurs import cost
from secateurs.data import Dataset
from secateurs.interfaces import Artifact, Converter, Exporter, Metric, ProgressEvent, Target
from secateurs.pipeline import Outcome, Session
from secateurs.proof import Structure, compare, prove
from secateurs.recipe import Recipe
from secateurs.report import Report, Variant
from secateurs.settings import TargetSettings

__all__ = ["FILES", "Shipping"]

FILES = ("baseline.onnx", "model.onnx")
"""The two files of every run; others are named after them."""
EXPORTED = 8
"""Calibration examples that the exporter sees."""


@dataclass(frozen=True)
class Files:
    """What was written: the dense and the pruned file, and both quantised where the recipe asks for it."""

    dense: Artifact
    pruned: Artifact
    quantised: tuple[Artifact, Artifact] | None = None

    @property
    def ships(self) -> Artifact:
        """The file that the verdict is about."""
        return self.pruned if self.quantised is None else self.quantised[1]

    @property
    def notes(self) -> list[str]:
        """What has to be said about each file."""
        every = (self.dense, self.pruned, *(self.quantised or ()))
        return [f"{file.path.name}: {note}" for file in every for note in file.notes]


@dataclass(frozen=True)
class Shipping:
    """How the files of a recipe are made and judged.

    Attributes:
        recipe: the whole recipe.
        exporter: writes a network.
        edge: fixes the shapes of a file, or None.
        quantiser: quantises a file, or None.
        targets: where the files are measured.
        evaluation: the examples of the verdict, or None.
        metric: of the recipe.
    """

    recipe: Recipe
    exporter: Exporter
    edge: Converter | None
    quantiser: Converter | None
    targets: Sequence[tuple[Target, TargetSettings]]
    evaluation: Dataset | None
    metric: Metric

    def prove(self, session: Session, outcome: Outcome, model: nn.Module, output: Path) -> Report:
        """Write every file into the output folder and measure what ships beside the baseline.

        Args:
            session: of the run; its baseline is the dense network.
            outcome: of the passes.
            model: the network that ships.
            output: the folder.

        Returns:
            The report, without passes.

        Raises:
            ExportError: a file cannot be written, or does not do what it should.
        """
        calibration = session.roles.calibration
        files = self._write(session, model, output)
        networks = (session.baseline, model)
        macs = cost.change(cost.macs, session.baseline, model, session.context(model).example)
        structures = [
            Structure(cost.total(cost.parameters(network)), count)
            for network, count in zip(networks, macs.counts, strict=True)
        ]
        reasons = list(outcome.shortfalls)
        if not outcome.plan.removes:
            reasons.append("nothing could be pruned; every reason is listed under `passes`")
        targets = [(target, _at_length(settings, calibration)) for target, settings in self.targets]
        report = prove(
            files.dense,
            files.ships,
            targets,
            budget=self.recipe.budget,
            evaluation=self.evaluation,
            metric=self.metric,
            seed=self.recipe.seed,
            structures=(structures[0], structures[1]),
            reasons=reasons,
            progress=session.progress,
        )
        report.parity = files.pruned.parity
        report.notes += [*files.notes, *([] if macs.reason is None else [macs.reason])]
        if files.quantised is not None:
            report.variants = self._variants(files, report, targets, structures, session)
        return report

    def _write(self, session: Session, model: nn.Module, output: Path) -> Files:
        calibration, export, quantise = session.roles.calibration, self.recipe.export, self.recipe.quantise
        example = calibration.take(range(min(EXPORTED, len(calibration))))

        def tell(done: int, name: str) -> None:
            session.progress(ProgressEvent("export", done, 2 if quantise is None else 4, name))

        exported: list[Artifact] = []
        for network, name in zip((session.baseline, model), FILES, strict=True):
            tell(len(exported), name)
            exported.append(self.exporter(network, example, output / name, opset=export.opset))
        quantised: list[Artifact] = []
        if quantise is not None and self.quantiser is not None:
            for file in exported:
                path = _named(file.path, "quantised")
                tell(len(exported) + len(quantised), path.name)
                quantised.append(self.quantiser(file, path, settings=quantise, examples=calibration))
        if export.edge is not None and self.edge is not None:
            for file in (*exported, *quantised[1:]):
                self.edge(file, _named(file.path, "edge"), settings=export.edge, examples=calibration)
        return Files(exported[0], exported[1], (quantised[0], quantised[1]) if quantised else None)

    def _variants(
        self,
        files: Files,
        report: Report,
        targets: Sequence[tuple[Target, TargetSettings]],
        structures: Sequence[Structure],
        session: Session,
    ) -> list[Variant]:
        """Return the table of four files; the two that do not ship are measured on the first target, with few repeats."""
        assert files.quantised is not None
        short = [(target, _short(settings)) for target, settings in targets[:1]]
        found = {}
        for name, file, structure in (
            ("pruned", files.pruned, structures[1]),
            ("quantised", files.quantised[0], structures[0]),
        ):
            compared = compare(
                files.dense,
                file,
                short,
                evaluation=self.evaluation,
                metric=self.metric,
                structures=(structures[0], structure),
                progress=session.progress,
            )
            found[name] = Variant(name=name, ships=False, side=compared.after, ratios=compared.ratios)
        return [
            Variant(name="dense", ships=False, side=report.baseline),
            found["pruned"],
            found["quantised"],
            Variant(name="pruned and quantised", ships=True, side=report.candidate, ratios=report.ratios),
        ]


def _named(path: Path, kind: str) -> Path:
    """Return `model.kind.onnx` for `model.onnx`."""
    return path.with_name(f"{path.name.removesuffix('.onnx')}.{kind}.onnx")


def _at_length(settings: TargetSettings, calibration: Dataset) -> TargetSettings:
    """Return the settings with the calibration data's sequence length where none is given, as seeded inputs need one."""
    if settings.sequence_length is not None or calibration.length is None:
        return settings
    return settings.model_copy(update={"sequence_length": calibration.length})


def _short(settings: TargetSettings) -> TargetSettings:
    return settings.model_copy(update={"max_processes": settings.processes, "memory_repeats": 1})
