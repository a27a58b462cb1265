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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from secateurs import processes
from secateurs.errors import PluginError, SecateursError, UserError
from secateurs.faults import told
from secateurs.manager import Manager, PluginWarning, create_manager
from secateurs.printed import CLOSE, print_report, trial_table
from secateurs.terminal import escape

if TYPE_CHECKING:
    from secateurs.registry import Entry
    from secateurs.report import Report
    from secateurs.runner import Pruned

__all__ = ["build_app", "main"]

_out = Console(quiet=not processes.is_main())
_err = Console(stderr=True)
_WIDE = "160"
"""Columns where there is no terminal; rich would take 80, and cut tables for nobody."""
_GRACE = 5.0
"""Seconds that other processes wait before they report an error: most find what the main one finds, and the launcher ends them when it does."""

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to do.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a variable or a dotted key of the recipe.")
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if not any(os.isatty(stream) for stream in (0, 1, 2)):
        os.environ.setdefault("COLUMNS", _WIDE)
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
    from secateurs.progress import progress_bar

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
        print_report(_out, report, output)
    if resume and processes.is_main():
        _tell_other_environment(report)
    return 0 if report.verdict == "pass" else 1


def _tell_other_environment(report: Report) -> None:
    """Say what has changed since the figures of a report were made; of a report that was made just now there is nothing to say."""
    from secateurs import proof

    made = report.environment
    now = proof.environment(made.seed, made.threads)
    before, here = ({**one.versions, "processor": one.cpu} for one in (made, now))
    changed = [
        f"{name} {before.get(name, 'not known')} (here {here.get(name, 'missing')})"
        for name in sorted({*before, *here} - {"system"})
        if before.get(name) != here.get(name)
    ]
    if changed:
        told = f"note: these are the figures of a finished run, made with {', '.join(changed)}; `--overwrite` makes them anew."
        _err.print(f"[yellow]{escape(told)}[/]", soft_wrap=True)


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
        _out.print(trial_table(pruned.trials))
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
    from secateurs.progress import progress_bar

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
    name: Annotated[
        str | None, typer.Argument(metavar="[PASS]", help="Describe every setting of this one.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every option.")] = False,
) -> int:
    """List every pass, its plugin, and its settings with defaults; or describe one."""
    manager: Manager = ctx.obj
    known = manager.registries.passes
    listed = []
    for entry in known if name is None else [known[name]]:
        try:
            listed.append(_describe(entry))
        except PluginError as error:
            if name is not None:
                raise
            _err.print(f"[yellow]warning:[/] {escape(str(error))}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
        return 0
    if name is not None:
        for item in listed:
            _out.print(f"[bold]{escape(item['name'])}[/]: {escape(item['summary'])} [dim]({escape(item['plugin'])})[/]")
            _out.print(_settings_table(item["settings"]))
        return 0
    table = Table(title="passes", show_lines=True)
    for heading in ("pass", "plugin", "what it does", "settings (defaults)"):
        table.add_column(heading)
    for item in listed:
        shown = ", ".join(f"{name}={_short(setting['default'])}" for name, setting in item["settings"].items())
        table.add_row(item["name"], item["plugin"], escape(item["summary"]), escape(shown))
    _out.print(table)
    _out.print("`secateurs passes PASS` describes the settings of one", style="dim")
    return 0


def _settings_table(settings: dict[str, Any]) -> Table:
    """Return the settings of a pass, each with its default, what is allowed, and what it means."""
    table = Table(**CLOSE)
    table.add_column("setting", no_wrap=True)
    for heading in ("default", "allowed", "what it is"):
        table.add_column(heading)
    for name, setting in settings.items():
        default = "required" if setting["required"] else _short(setting["default"])
        table.add_row(*(escape(text) for text in (name, default, _allowed(setting["schema"]), setting["description"])))
    return table


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _allowed(schema: dict[str, Any]) -> str:
    """Say what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_allowed(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "null":
        return "none"
    if schema.get("type") == "array":
        return f"list of {_allowed(schema.get('items', {}))}"
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    return f"{schema.get('type', 'anything')} {bounds}".rstrip()


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
    if isinstance(value, (tuple, list)):
        return "|".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
