"""`secateurs bundle`: a folder that measures a run's files on a device. Light: what it needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateurs.errors import DataError, RecipeError, UserError, printable
from secateurs_adapters.commands import load_evaluation, needs_onnx

if TYPE_CHECKING:
    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact
    from secateurs.settings import TargetSettings

__all__ = ["bundle"]


def bundle(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of `secateurs run`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, to copy to the device.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="SPEC", help="Other examples than the run's evaluation data; as for `secateurs validate`."
        ),
    ] = None,
    seeded: Annotated[bool, typer.Option("--seeded", help="Make inputs from the signature; no labels travel.")] = False,
    edge: Annotated[
        bool, typer.Option("--edge", help="The variants with fixed shapes, which `export.edge` of the recipe writes.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Examples at the most.")] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples per run, as for the run's first target by default.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Size of dynamic axes other than the batch in seeded inputs.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference of outputs on the device, as a share of their largest value."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a folder that measures both files of a run on a device that has only onnxruntime and numpy.

    It measures as for the run's first target: on its provider, with its threads and batch size; `measure.py` takes others. Of
    metrics it only knows accuracy: where the run has another, no labels travel.
    """
    with needs_onnx("bundle"):
        from secateurs_adapters.bundle import TOLERANCE, write_bundle
    if seeded and data is not None:
        raise RecipeError("`--seeded` and `--data` exclude each other; give one.")
    examples, metric = (None, "") if seeded else _bundled_data(run, data)
    if examples is not None:
        examples = _distinct(examples)
        examples = examples.sampled(min(samples, len(examples)), 0)
    try:
        manifest = write_bundle(
            *_bundled_files(run, edge=edge),
            output,
            data=examples,
            labelled=metric == "accuracy",
            target=_bundled_target(run, batch_size=batch_size, sequence_length=sequence_length),
            tolerance=TOLERANCE if tolerance is None else tolerance,
        )
    except DataError as error:
        if examples is None or not edge:
            raise
        raise DataError(f"{error} With `--edge`, `--seeded` makes inputs of the sizes that the files fix.") from None
    if examples is not None and examples.labels is not None and metric != "accuracy":
        note = f"note: the run's metric is {metric!r}, and a device only counts right answers: no labels travel, and the drop is not judged."
        typer.echo(printable(note), err=True)
    size = sum(file["bytes"] for file in manifest["files"].values())
    if as_json:
        files = sorted(manifest["files"])
        told = {"folder": str(output), "files": files, "bytes": size, "examples": manifest["examples"]}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(
        f"{output}: {len(manifest['files'])} files, {size / 2**20:.1f} MiB, {manifest['examples']} examples; README.txt there says how"
    )


def _bundled_files(run: Path, *, edge: bool) -> tuple[Artifact, Artifact]:
    """Return the file before and the file that ships; of an edge variant, those with fixed shapes."""
    from secateurs_adapters.artifact import read_artifact

    end = ".edge.onnx" if edge else ".onnx"
    quantised = run / f"model.quantised{end}"
    paths = (run / f"baseline{end}", quantised if quantised.exists() else run / f"model{end}")
    if edge and not all(path.is_file() for path in paths):
        raise DataError(
            f"{str(run)!r} holds no variants with fixed shapes; `export: {{edge: {{batch_size: 1}}}}` in the recipe writes them."
        )
    return read_artifact(paths[0]), read_artifact(paths[1])


def _bundled_data(run: Path, data: Path | None) -> tuple[Dataset | None, str]:
    """Return the examples to bundle, from `--data`, else the evaluation role of the run's recipe, and the run's metric."""
    if data is not None:
        return load_evaluation(data), _metric_of(run)
    from secateurs.manager import create_manager
    from secateurs.recipe import load_recipe
    from secateurs.sources import evaluation_examples

    recipe = load_recipe(run / "recipe.yaml")
    try:
        return evaluation_examples(recipe, create_manager()), recipe.metric
    except UserError as error:
        raise type(error)(
            f"{error} To bundle without the run's evaluation data, give `--data SPEC` or `--seeded`."
        ) from None


def _distinct(examples: Dataset) -> Dataset:
    """Return each example once: a device counts all that it gets as independent."""
    first, _ = examples.repeats
    if len(first) == len(examples):
        return examples
    note = f"note: only {len(first)} of {len(examples)} examples are distinct; each travels once, so that none counts twice in a verdict."
    typer.echo(printable(note), err=True)
    return examples.take(first)


def _metric_of(run: Path) -> str:
    """Return the metric of a run's recipe; accuracy where there is no recipe that can be read, which `_bundled_target` tells."""
    from secateurs.recipe import load_recipe

    try:
        return load_recipe(run / "recipe.yaml").metric
    except UserError:
        return "accuracy"


def _bundled_target(run: Path, **given: int | None) -> TargetSettings:
    """Return the first target of a run's recipe that is onnxruntime's, with what was given in its place.

    Files and examples are what a bundle needs: without a recipe, or such a target in it, it is made for one thread of the CPU, and says so.
    """
    from secateurs.recipe import load_recipe
    from secateurs.settings import TargetSettings

    target, missing = TargetSettings(), f"{str(run)!r} has no recipe.yaml."
    if (recipe := run / "recipe.yaml").exists():
        try:
            found = [one for one in load_recipe(recipe).targets if one.provider.endswith("ExecutionProvider")]
            target, missing = (
                (found[0], "") if found else (target, "no target of the run is a provider of onnxruntime.")
            )
        except UserError as error:
            missing = str(error)
    if missing:
        note = f"note: {missing} The bundle is made for one thread of the CPU; `measure.py` takes `--provider` and `--threads`."
        typer.echo(printable(note), err=True)
    return target.model_copy(update={name: value for name, value in given.items() if value is not None})
