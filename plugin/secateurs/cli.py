"""The command line. Light: torch is imported when a command that needs it runs.

Exit codes: 0 all verdicts pass; 1 a verdict fails or stays undecided, a target was not reached, or nothing could be pruned; 2 the recipe or the
arguments are wrong; 3 the run failed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from secateurs import hookimpl, processes
from secateurs.errors import PluginError, SecateursError, UserError
from secateurs.faults import told
from secateurs.manager import Manager, PluginWarning, create_manager
from secateurs.tables import TRIAL_HEADINGS, VARIANT_HEADINGS, figure_rows, trial_rows, variant_rows
from secateurs.terminal import escape

if TYPE_CHECKING:
    from secateurs.interfaces import ProgressEvent
    from secateurs.registry import Entry
    from secateurs.report import Report, Trial
    from secateurs.runner import Pruned

__all__ = ["build_app", "main", "progress_bar", "report_table"]

_out = Console(quiet=not processes.is_main())
_err = Console(stderr=True)
_CLOSE: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
"""Style of tables that have to fit 80 columns."""
_GRACE = 5.0
"""Seconds that other processes wait before they report an error: most find what the main one finds, and the launcher ends them when it does."""

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to do.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a variable or a dotted key of the recipe.")
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Threads that spin while they wait take the processor from whoever else computes here, and slow everybody many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        manager = _manager()
        code = build_app(manager)(given, standalone_mode=False, prog_name="secateurs", obj=manager)
    except SecateursError as error:
        code = _fail(error, error.exit_code, debug)
    except KeyboardInterrupt:
        code = _fail(SecateursError("interrupted."), 3, debug)
    except Exception as error:  # the last resort: never a traceback without --debug
        if callable(
            show := getattr(error, "show", None)
        ):  # a usage error of the argument parser, which typer carries inside itself
            show()
            code = 2
        else:
            code = _fail(error, 3, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException, code: int, debug: bool) -> int:
    if not processes.is_main():
        time.sleep(_GRACE)
    if debug:
        traceback.print_exception(error)
    unforeseen = f"the run failed: {type(error).__name__}: {error}. `--debug` shows where."
    text = str(error) if isinstance(error, SecateursError) else told(error) or unforeseen
    where = "" if processes.is_main() else f"process {processes.rank()}: "
    _err.print(f"[bold red]error:[/] {escape(where + text)}", soft_wrap=True)
    return code


def _manager() -> Manager:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PluginWarning)
        manager = create_manager()
    for warning in caught:
        _err.print(f"[yellow]warning:[/] {escape(str(warning.message))}", soft_wrap=True)
    return manager


def build_app(manager: Manager) -> Any:
    """Return the command line with the built-in commands and those that plugins registered."""
    app = typer.Typer(
        help="Prune trained PyTorch networks so that they fit a device, and prove it on the ONNX file that ships.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        epilog="`--debug` anywhere shows the traceback of an error.",
    )
    app.callback(help=app.info.help)(_root)
    for name, function in (("run", _run), ("inspect", _inspect), ("passes", _passes)):
        app.command(name)(_interruptible(function, name))
    for entry in manager.registries.commands:
        about = entry.summary[:1].upper() + entry.summary[1:] + "." if entry.summary else None
        app.command(entry.name, help=about)(_interruptible(entry.load(), entry.name))
    return typer.main.get_command(app)


_INTERRUPTED = {
    "run": "interrupted; `secateurs run --resume` goes on after the last finished pass or trial.",
    "zoo": "interrupted; `secateurs zoo --resume` goes on after the last finished models.",
}


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"secateurs {importlib.metadata.version('secateurs')}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Take what stands before a command."""


def _interruptible(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Turn Ctrl-C into an error with our exit code and words, before the argument parser sees it."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            raise SecateursError(_INTERRUPTED.get(name, "interrupted.")) from None

    return command


# --- run --------------------------------------------------------------------------------------------------------------------------------


def _run(
    ctx: typer.Context,
    recipe: RecipePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything is written.")] = Path(
        "secateurs-out"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same recipe.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the predicted savings; write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report (or, with --dry-run, the plan) as JSON.")
    ] = False,
    overrides: Overrides = None,
) -> int:
    """Prune, export and validate a network as the recipe says."""
    if resume and overwrite:
        raise UserError("`--resume` and `--overwrite` exclude each other; give one.")
    from secateurs.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from secateurs import runner

    manager: Manager = ctx.obj
    with progress_bar(manager) as progress:
        prepared = runner.prepare(loaded, manager, progress)
        if dry_run:
            pruned = runner.dry_run(prepared)
        else:
            report = runner.run(prepared, output, resume=resume, overwrite=overwrite)
    if dry_run:
        if processes.is_main():
            _print_plan(pruned, prepared, as_json)
        return 0 if pruned.outcome.plan.removes and not pruned.outcome.shortfalls else 1
    if as_json and processes.is_main():
        sys.stdout.write(report.to_json())
    elif not as_json:
        _print_report(report, output)
    return 0 if report.verdict == "pass" else 1


_PREDICTED = (
    ("parameters", "parameters", ",.0f", 1),
    ("MACs", "macs", ",.0f", 1),
    ("latency, predicted, ms", "latency", ".4g", 1),
    ("peak memory, planned, MiB", "peak_memory", ".4g", 2**20),
)
"""Of a dry run: what is shown, the cost model that tells it, the figures' form and unit."""


def _print_plan(pruned: Pruned, prepared: Any, as_json: bool) -> None:
    from secateurs import cost

    outcome = pruned.outcome
    if as_json:
        sys.stdout.write(outcome.plan.to_json())
        return
    if pruned.trials:
        _out.print(_trial_table(pruned.trials))
    for edit in outcome.plan.edits:
        if edit.edit == "drop_block":
            _out.print(f"drop block    {escape(edit.path)}  [dim]{escape(edit.reason)}[/]")
        elif edit.edit == "remove_units":
            _out.print(f"remove units  {escape(edit.root)}  [dim]{escape(edit.reason)}[/]")
    one = prepared.session.roles.calibration.take([0])
    for what, model, form, scale in _PREDICTED:
        if model in prepared.manager.registries.cost_models:
            found = cost.change(prepared.session.cost_models(model), prepared.session.baseline, outcome.model, one)
            figures = f"{found.before / scale:{form}} -> {found.after / scale:{form}} ({found.ratio:.3f})"
            _out.print(escape(f"{what}: {found.reason or figures}"))
    for shortfall in outcome.shortfalls:
        _out.print(f"[yellow]{escape(shortfall)}[/]")
    if not outcome.plan.removes:
        _out.print("[yellow]nothing could be pruned[/]")


def _print_report(report: Report, output: Path) -> None:
    if report.trials:
        _out.print(_trial_table(report.trials))
    _out.print(report_table(report))
    if report.variants:
        table = Table(title="pruning and quantisation, each file beside the dense one", **_CLOSE)
        table.add_column(VARIANT_HEADINGS[0], min_width=10)
        for heading in VARIANT_HEADINGS[1:]:
            table.add_column(heading, justify="right", max_width=10)
        for one in variant_rows(report.variants):
            table.add_row(*one)
        _out.print(table)
    for record in report.passes:
        certificate = record.certificate
        proof = (
            ""
            if certificate is None
            else f", certified to {certificate.max_abs:.2g} on a scale of {certificate.scale:.3g}"
        )
        _out.print(
            f"{record.name}: {record.edits} edits, {len(record.skipped)} skipped{proof} [dim]({record.seconds:.1f} s)[/]"
        )
    for reason in report.reasons:
        _out.print(f"[red]{escape(reason)}[/]")
    for row in report.budget:
        if row.status != "pass":
            measured = "nothing" if row.measured is None else f"{row.measured:.4g}"
            reason = f" ({row.reason})" if row.reason else ""
            where = f" on {row.target}" if row.target else ""
            _out.print(
                f"[red]{row.status}: {row.name}{escape(where)} measured {measured}, allowed {row.limit:g}{escape(reason)}[/]"
            )
    colour = {"pass": "green", "fail": "red", "undecided": "yellow"}[report.verdict]
    seconds = "" if report.seconds is None else f" in {report.seconds:.1f} s"
    _out.print(
        f"verdict: [bold {colour}]{report.verdict}[/]{seconds}; everything is in {escape(str(output))}", soft_wrap=True
    )


def _trial_table(trials: Sequence[Trial]) -> Table:
    """Return the table of the networks that a search tried."""
    table = Table(title="trials of the search, on validation data", **_CLOSE)
    for heading in TRIAL_HEADINGS:
        table.add_column(heading, justify="right")
    for trial, row in zip(trials, trial_rows(trials), strict=True):
        table.add_row(*row, style="bold green" if trial.chosen and trial.accepted else None)
    return table


def report_table(report: Report) -> Table:
    """Return the table baseline | candidate | ratio | budget | verdict of a report, a section per target."""
    table = Table(title="baseline and candidate, on the exported files", **_CLOSE)
    table.add_column("figure", min_width=16)
    for heading in ("baseline", "candidate", "ratio", "budget"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", min_width=9)
    colours = {"pass": "green", "fail": "red", "undecided": "yellow"}
    where = ""
    for row in figure_rows(report):
        if row.where != where:
            where = row.where
            table.add_section()
            table.add_row(f"[bold]{escape(where)}[/]")
        verdict = f"[{colours[row.status]}]{row.status}[/]" if row.status else ""
        table.add_row(escape(row.what), row.baseline, row.candidate, row.ratio, row.budget, verdict)
    return table


# --- inspect and passes -----------------------------------------------------------------------------------------------------------------


def _inspect(
    ctx: typer.Context,
    recipe: RecipePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    overrides: Overrides = None,
) -> int:
    """Show what can be pruned and what cannot, with the reason: blocks, groups, CKA map, cost."""
    from secateurs.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from secateurs import inspection, runner

    manager: Manager = ctx.obj
    with progress_bar(manager) as progress:
        prepared = runner.prepare(loaded, manager, progress)
        found = inspection.inspect(prepared.session)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        for renderable in inspection.render(found):
            _out.print(renderable)
    return 0


def _passes(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every option.")] = False,
) -> int:
    """List every pass, its plugin, and its settings with defaults."""
    manager: Manager = ctx.obj
    listed = []
    for entry in manager.registries.passes:
        try:
            listed.append(_describe(entry))
        except PluginError as error:
            _err.print(f"[yellow]warning:[/] {escape(str(error))}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
        return 0
    table = Table(title="passes", show_lines=True)
    for heading in ("pass", "plugin", "what it does", "settings (defaults)"):
        table.add_column(heading)
    for item in listed:
        shown = ", ".join(f"{name}={_short(setting['default'])}" for name, setting in item["settings"].items())
        table.add_row(item["name"], item["plugin"], escape(item["summary"]), escape(shown))
    _out.print(table)
    return 0


def _describe(entry: Entry[Any]) -> dict[str, Any]:
    model = entry.load_settings()
    schema = {} if model is None else model.model_json_schema()["properties"]
    settings = {
        name: {
            "default": field.get_default(call_default_factory=True, validated_data={})
            if not field.is_required()
            else None,
            "required": field.is_required(),
            "description": field.description or "",
            "schema": {
                key: value for key, value in schema[name].items() if key not in ("default", "description", "title")
            },
        }
        for name, field in ({} if model is None else model.model_fields).items()
    }
    return {"name": entry.name, "plugin": entry.plugin, "summary": entry.summary, "settings": settings}


def _short(value: object) -> str:
    return "none" if value is None else "|".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


# --- progress ---------------------------------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(manager: Manager) -> Iterator[Any]:
    """Show a bar on the terminal while a block works, fed by the hook `secateurs_progress`; silent in CI and where there is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_err,
        transient=True,
        disable=not (_err.is_interactive and processes.is_main()) or bool(os.environ.get("CI")),
    )
    plugin = _Bar(bar)
    manager.register(plugin, name="secateurs-progress-bar")
    try:
        with bar:
            yield (
                (lambda event: manager.hook.secateurs_progress(event=event))
                if processes.is_main()
                else (lambda _: None)
            )
    finally:
        manager.unregister(plugin)


class _Bar:
    """Draws progress events as one line per task, the current one last."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}

    @hookimpl
    def secateurs_progress(self, event: ProgressEvent) -> None:
        """Show an event."""
        if event.task not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[event.task] = self._bar.add_task(event.task, total=event.total, detail="")
        self._bar.update(
            self._tasks[event.task], completed=event.done, total=event.total, detail=event.detail, visible=True
        )
