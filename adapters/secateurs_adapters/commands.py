"""Sub-commands of `secateurs`. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateurs.errors import BudgetError, DataError, PluginError, RecipeError, UserError

if TYPE_CHECKING:
    from secateurs.budget import Budget
    from secateurs.data import Dataset
    from secateurs.interfaces import Metric
    from secateurs.report import Report
    from secateurs.settings import TargetSettings

__all__ = ["devices", "load_budget", "load_evaluation", "needs_onnx", "validate"]


def validate(
    baseline: Annotated[
        Path | None, typer.Argument(metavar="BASELINE.onnx", help="The file before pruning.", show_default=False)
    ] = None,
    candidate: Annotated[
        Path | None, typer.Argument(metavar="CANDIDATE.onnx", help="The file to judge.", show_default=False)
    ] = None,
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
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Execution provider; may be repeated. Without it, that of the budget's device, else the CPU.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="A registered metric: accuracy, perplexity, mean-iou, ... Without it, that of the recipe that `--budget` names, else accuracy."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Intra-op threads. Without it, those of the budget's device, else 1.")
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            help="Examples per run; may be repeated. Without it, what the files fix, else 1. Accuracy is taken in larger batches where that "
            "changes nothing."
        ),
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
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Judge what a device measured, `result.json` of a bundle; measure nothing here."
        ),
    ] = None,
    fits: Annotated[
        bool, typer.Option("--fits", help="Find the smallest memory limit under which each file still runs.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML too, for a CI server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Check a file against the one it replaces: latency, memory, size and accuracy, within a budget.

    Without data, seeded inputs are made from the file's signature, and the report tells the share on which both files
    agree. A file is tried in a process with limits on time and memory before it is measured. With `--measured`, the
    files may be left out: they are those of the bundle.
    """
    limits = load_budget(budget)
    metric = metric or _recipe_metric(budget) or "accuracy"
    if measured is not None:
        _finish(_judged(measured, baseline, candidate, limits, metric, allow_elsewhere), junit, as_json)
    if baseline is None or candidate is None:
        raise RecipeError(
            "`secateurs validate` compares two files: give BASELINE.onnx and CANDIDATE.onnx, or `--measured FILE`."
        )
    limits, targets = _filled(
        limits,
        provider or [None],
        batch_size or [1],
        sequence_length or [None],
        fits=fits,
        **({} if threads is None else {"threads": threads}),
        allow_elsewhere=allow_elsewhere,
        repeats=repeats,
        max_processes=max_processes,
    )
    evaluation = load_evaluation(data)
    from secateurs.manager import create_manager
    from secateurs.progress import progress_bar

    with needs_onnx("validate"):
        from secateurs_adapters.validate import validate_files
    with progress_bar(create_manager()) as progress:
        report = validate_files(
            baseline,
            candidate,
            targets=targets,
            budget=limits,
            evaluation=evaluation,
            metric=_metric(metric),
            progress=progress,
            adopt_batch=batch_size is None,
            time_limit=time_limit,
            memory_limit_mib=memory_limit,
        )
    _finish(report, junit, as_json)


def _judged(
    measured: Path, baseline: Path | None, candidate: Path | None, budget: Budget, metric: str, allow_elsewhere: float
) -> Report:
    with needs_onnx("validate"):
        from secateurs_adapters.measured import judge_result
    if (baseline is None) != (candidate is None):
        raise RecipeError("give both BASELINE.onnx and CANDIDATE.onnx with `--measured`, or neither.")
    report = judge_result(
        measured, baseline=baseline, candidate=candidate, budget=budget, allow_elsewhere=allow_elsewhere
    )
    if metric != "accuracy" and any(figures.accuracy is not None for figures in report.candidate.targets):
        raise RecipeError(
            f"the metric asked for is {metric!r}, and a device only counts right answers; give `--metric accuracy` to judge the drop by them."
        )
    return report


@contextmanager
def needs_onnx(command: str) -> Iterator[None]:
    """Turn a missing package into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise PluginError(
            f"`secateurs {command}` needs {error.name}, which is not installed; pip install 'secateurs[onnx]'."
        ) from None


def _finish(report: Report, junit: Path | None, as_json: bool) -> None:
    """Print and write a report, and exit with its verdict's code."""
    if junit is not None:
        from secateurs_adapters.junit import write_junit

        write_junit(report, junit)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        from rich.console import Console

        from secateurs.printed import print_verdict

        print_verdict(Console(), report)
    raise typer.Exit(0 if report.verdict == "pass" else 1)


def devices(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print as JSON, with what each is and the source of each figure.")
    ] = False,
) -> None:
    """List the devices that `budget.device` may name, with what their profiles limit. None says how fast a device is."""
    from secateurs.devices import MEMORY_SHARE
    from secateurs.manager import create_manager

    known = [(entry, entry.load()) for entry in create_manager().registries.devices]
    if as_json:
        rows = [{"name": entry.name, "plugin": entry.plugin, **device.model_dump()} for entry, device in known]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from secateurs.printed import CLOSE

    table = Table(**CLOSE)
    table.add_column("device", no_wrap=True)
    for heading in ("RAM, MiB", f"limit at {MEMORY_SHARE:.0%}", "files, MiB", "threads of cores"):
        table.add_column(heading, justify="right", max_width=8)
    table.add_column("provider", no_wrap=True)
    for entry, device in known:
        limit = None if device.ram_mib is None else device.ram_mib * MEMORY_SHARE
        figures = ("" if value is None else f"{value:g}" for value in (device.ram_mib, limit, device.artifact_mib))
        threads, provider = f"{device.threads} of {device.cores}", device.provider.removesuffix("ExecutionProvider")
        table.add_row(entry.name, *figures, threads, provider)
    Console().print(table)
    typer.echo(
        f"`budget.device` takes one of them: {MEMORY_SHARE:.0%} of its RAM as the limit on peak memory, `files` as that on all files, and its\n"
        "threads and provider where a target names none. `--json` adds what each is, and the source of each figure."
    )


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
    limits = parse_budget(section)
    if limits.device is None:
        return limits
    from secateurs.devices import fill_in
    from secateurs.manager import create_manager

    return fill_in(limits, (), create_manager().registries.devices)[0]


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
    from secateurs.manager import create_manager
    from secateurs.recipe import parse_data
    from secateurs.sources import load_examples

    spec = parse_data(_mapping(path, "data specification", RecipeError), str(path))
    return load_examples(spec, str(path), create_manager()).sampled(spec.samples, 0)


def _filled(
    budget: Budget, providers: Sequence[str | None], batch_sizes: list[int], lengths: Sequence[int | None], **more: Any
) -> tuple[Budget, tuple[TargetSettings, ...]]:
    """Return a target for each provider, batch size and sequence length; budget and targets with what they leave to a device."""
    from pydantic import ValidationError

    from secateurs.devices import fill_in
    from secateurs.manager import create_manager
    from secateurs.settings import TargetSettings

    try:
        targets = [
            TargetSettings.model_validate(
                {**({} if name is None else {"provider": name}), "batch_size": size, "sequence_length": length, **more}
            )
            for name, size, length in itertools.product(providers, batch_sizes, lengths)
        ]
        return fill_in(budget, targets, create_manager().registries.devices)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"`--{option}`: {first['msg']} (got {first['input']!r}); give another value.") from None


def _recipe_metric(budget: Path | None) -> str | None:
    """Return the metric of the recipe whose budget judges; None where the file holds a budget alone, or names none."""
    content = {} if budget is None else _mapping(budget, "budget", BudgetError)
    name = content.get("metric") if "budget" in content else None
    if name is not None and not isinstance(name, str):
        raise RecipeError(
            f"`metric` in {str(budget)!r} is {name!r}; it needs the name of a metric, such as `accuracy`."
        )
    return name


def _metric(name: str) -> Metric:
    from secateurs.manager import create_manager

    return create_manager().registries.metrics[name].make()


def _mapping(path: Path, kind: str, error: type[UserError]) -> dict[str, Any]:
    from secateurs.plain_yaml import load_yaml

    content = load_yaml(path, kind, error)
    if not isinstance(content, dict):
        raise error(f"the {kind} {str(path)!r} holds {type(content).__name__}; it needs `key: value` lines.")
    return content


def _read_npz(path: Path) -> Dataset:
    from secateurs.data import Dataset
    from secateurs_adapters.data_settings import MAX_BYTES
    from secateurs_adapters.npz import read_arrays

    if not path.is_file():
        raise DataError(f"the data file {str(path)!r} is missing; give an .npz that exists.")
    arrays = read_arrays(path, None, MAX_BYTES)
    labels = arrays.pop("labels", None)
    return Dataset(arrays, labels, f"npz:{path}")
