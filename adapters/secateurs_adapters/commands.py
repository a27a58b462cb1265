"""Sub-commands of `secateurs`. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateurs.errors import BudgetError, DataError, PluginError, RecipeError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from secateurs.budget import Budget
    from secateurs.data import Dataset
    from secateurs.interfaces import Metric, ProgressEvent
    from secateurs.report import BudgetRow, Estimate, Latency, Report, TargetFigures, TargetRatios
    from secateurs.settings import TargetSettings

__all__ = ["load_budget", "load_evaluation", "validate", "verdict_table"]


def validate(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE.onnx", help="The file before pruning.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE.onnx", help="The file to judge.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="SPEC", help="Labelled evaluation data: an .npz, or a YAML or JSON file with `source: npz`."
        ),
    ] = None,
    budget: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with limits, e.g. `latency_ratio: 0.8`.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Execution provider; may be repeated.")
    ] = None,
    metric: Annotated[str, typer.Option(help="A registered metric: accuracy, perplexity, mean-iou, ...")] = "accuracy",
    threads: Annotated[int, typer.Option(help="Intra-op threads.")] = 1,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Examples per run; may be repeated. Without it, what the files fix, else 1."),
    ] = None,
    sequence_length: Annotated[
        list[int] | None,
        typer.Option(help="Size of dynamic axes other than the batch; may be repeated. Without it, 16, or what runs."),
    ] = None,
    allow_elsewhere: Annotated[
        float, typer.Option(help="Share of the time that may pass on other providers than the one asked for.")
    ] = 0.0,
    repeats: Annotated[int, typer.Option(help="Rounds (baseline, candidate, candidate, baseline) per process.")] = 40,
    max_processes: Annotated[
        int, typer.Option(help="Processes that latency takes at the most, while its verdict is undecided.")
    ] = 15,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="That runs may take; grows with the files by default.")
    ] = None,
    memory_limit: Annotated[
        int | None, typer.Option(metavar="MIB", help="That a file may take; grows with the file by default.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML too, for a CI server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Check a file against the one it replaces: latency, memory, size and accuracy, within a budget.

    Without data, seeded inputs are made from the file's signature, and the report tells the share on which both files
    agree. A file is tried in a process with limits on time and memory before it is measured.
    """
    limits = load_budget(budget)
    targets = _targets(
        provider or ["CPUExecutionProvider"],
        batch_size or [1],
        sequence_length or [None],
        threads=threads,
        allow_elsewhere=allow_elsewhere,
        repeats=repeats,
        max_processes=max_processes,
    )
    evaluation = load_evaluation(data)
    try:
        from secateurs_adapters.validate import validate_files
    except ImportError as error:
        raise PluginError(
            f"`secateurs validate` needs {error.name}, which is not installed; pip install 'secateurs[onnx]'."
        ) from None
    report = validate_files(
        baseline,
        candidate,
        targets=targets,
        budget=limits,
        evaluation=evaluation,
        metric=_metric(metric),
        progress=_tell,
        adopt_batch=batch_size is None,
        time_limit=time_limit,
        memory_limit_mib=memory_limit,
    )
    _finish(report, junit, as_json)


def _finish(report: Report, junit: Path | None, as_json: bool) -> None:
    """Print and write a report, and exit with its verdict's code."""
    if junit is not None:
        from secateurs_adapters.junit import write_junit

        write_junit(report, junit)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        _print(report)
    raise typer.Exit(0 if report.verdict == "pass" else 1)


def load_budget(path: Path | None) -> Budget:
    """Read a budget file: the limits themselves, or a recipe's `budget` section. None is a budget without limits.

    Raises:
        BudgetError: the file is missing, is not YAML, or names an unknown limit.
    """
    from secateurs.budget import parse_budget

    content = {} if path is None else _mapping(path, "budget", BudgetError)
    section = content.get("budget", content)
    if not isinstance(section, Mapping):
        raise BudgetError(f"`budget` in {str(path)!r} is {section!r}; it needs limits, such as `latency_ratio: 0.8`.")
    return parse_budget(section)


def load_evaluation(path: Path | None) -> Dataset | None:
    """Read evaluation data; None where none is asked for.

    Args:
        path: an .npz with one array per graph input, by its name, and an array `labels`; or a YAML or JSON file that
            says what a recipe says of a role: `source`, `samples` and the source's own options.

    Raises:
        RecipeError: the specification is not readable, names an unknown source, or has unknown keys.
        DataError: the data is missing or malformed.
    """
    if path is None:
        return None
    if path.suffix == ".npz":
        return _read_npz(path)
    from secateurs.data import stratified_split
    from secateurs.manager import create_manager
    from secateurs.recipe import settings_from

    options = _mapping(path, "data specification", RecipeError)
    if "source" not in options:
        raise RecipeError(f"{str(path)!r} has no `source`; name a registered data source, such as `source: npz`.")
    entry = create_manager().registries.datasets[str(options.pop("source"))]
    samples = options.pop("samples", None)
    data = entry.load()(settings_from(entry.load_settings(), options, str(path)))
    return data if samples is None else data.take(stratified_split(data.labels, [samples], len(data), 0)[0])


def verdict_table(report: Report) -> Table:
    """Return the report as a table: baseline, candidate, ratio, budget and verdict, one quantity per row."""
    from rich.table import Table

    table = Table("", "baseline", "candidate", "ratio", "budget", "verdict")
    before, after, ratios = report.baseline, report.candidate, report.ratios
    pairs: list[tuple[str, str, str, str, str | None, tuple[str, ...]]] = [
        ("weights", _size(before.weight_bytes), _size(after.weight_bytes), "", None, ()),
        (
            "size",
            _size(before.artifact_bytes),
            _size(after.artifact_bytes),
            _number(ratios.artifact_bytes),
            None,
            ("artifact_",),
        ),
    ]
    for first, second, ratio in zip(before.targets, after.targets, ratios.targets, strict=True):
        label = first.label
        pairs += [
            (f"{name}, {label}", *cells, label, limits) for name, *cells, limits in _target_cells(first, second, ratio)
        ]
    shown = set()
    for name, one, other, ratio_text, target, limits in pairs:
        rows = [row for row in report.budget if limits and row.name.startswith(limits) and row.target == target]
        shown |= {id(row) for row in rows}
        table.add_row(name, one, other, ratio_text, *_budget_cells(rows))
    for row in report.budget:
        if id(row) not in shown:
            table.add_row(row.name, "", _number(row.measured), "", *_budget_cells([row]))
    return table


def _target_cells(first: TargetFigures, second: TargetFigures, ratios: TargetRatios) -> list[tuple[Any, ...]]:
    """Return name, baseline, candidate, ratio and the prefixes of the limits on it, for each quantity of one target."""
    latency = ["" if one.latency_ms is None else f"{one.latency_ms.p50:.4g} ms" for one in (first, second)]
    cells: list[tuple[Any, ...]] = [
        ("latency p50", *latency, _estimate(ratios.latency_p50), ("latency_",)),
        ("latency noise (cv)", *(_noise(one.latency_ms) for one in (first, second)), "", ()),
        (
            "peak memory",
            _size(first.peak_memory_bytes),
            _size(second.peak_memory_bytes),
            _number(ratios.peak_memory),
            ("peak_memory_",),
        ),
        (
            "activations (profiled)",
            _size(first.activation_bytes_profiled),
            _size(second.activation_bytes_profiled),
            "",
            (),
        ),
    ]
    if first.accuracy is not None and second.accuracy is not None:
        drop = f"drop {_estimate(ratios.accuracy_drop)}"
        cells.append(
            (first.accuracy.metric, _number(first.accuracy.value), _number(second.accuracy.value), drop, ("accuracy_",))
        )
    if ratios.agreement is not None:
        cells.append(("agreement (no labels)", "", _number(ratios.agreement), "", ()))
    return cells


def _budget_cells(rows: list[BudgetRow]) -> tuple[str, str]:
    colours = {"pass": "green", "fail": "red", "undecided": "yellow"}
    limits = "\n".join(f"{row.name} \u2264 {row.limit:g}" for row in rows)
    statuses = "\n".join(
        f"[{colours[row.status]}]{row.status}[/]" + (f" ({row.reason})" if row.reason else "") for row in rows
    )
    return limits, statuses


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console()
    console.print(verdict_table(report))
    for reason in report.reasons:
        console.print(f"fails: {reason}", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"verdict: {report.verdict}", markup=False)


def _tell(event: ProgressEvent) -> None:
    typer.echo(f"{event.task}: {event.detail}", err=True)


def _noise(latency: Latency | None) -> str:
    return "" if latency is None else f"{latency.cv:.0%} of {latency.n} runs"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _estimate(value: Estimate | None) -> str:
    if value is None or value.ci95 is None:
        return _number(None if value is None else value.value)
    return f"{value.value:.4g} \\[{value.ci95[0]:.4g}, {value.ci95[1]:.4g}]"


def _size(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:.3f} MiB"


def _targets(
    providers: list[str], batch_sizes: list[int], lengths: Sequence[int | None], **more: Any
) -> list[TargetSettings]:
    """Return a target for each provider, batch size and sequence length."""
    from pydantic import ValidationError

    from secateurs.settings import TargetSettings

    try:
        return [
            TargetSettings.model_validate({"provider": name, "batch_size": size, "sequence_length": length, **more})
            for name, size, length in itertools.product(providers, batch_sizes, lengths)
        ]
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"`--{option}`: {first['msg']} (got {first['input']!r}); give another value.") from None


def _metric(name: str) -> Metric:
    from secateurs.manager import create_manager

    return create_manager().registries.metrics[name].make()


def _mapping(path: Path, kind: str, error: type[UserError]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        said = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise error(f"the {kind} {str(path)!r} cannot be read: {said}; give a YAML or JSON file.") from None
    if not isinstance(content, dict):
        raise error(f"the {kind} {str(path)!r} holds {type(content).__name__}; it needs `key: value` lines.")
    return content


def _read_npz(path: Path) -> Dataset:
    import numpy as np

    from secateurs.data import Dataset

    if not path.is_file():
        raise DataError(f"the data file {str(path)!r} is missing; give an .npz that exists.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{str(path)!r} is not a readable .npz ({type(error).__name__}); write it with numpy.savez."
        ) from None
    labels = arrays.pop("labels", None)
    return Dataset(arrays, labels, f"npz:{path}")
