"""`secateurs zoo`. Light: what it needs is imported when it runs, and torch only in the models' own processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateurs.errors import PluginError, UserError

if TYPE_CHECKING:
    from secateurs_adapters.zoo.batch import Batch, Execute

__all__ = ["zoo"]


def zoo(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="ZOO.yaml", help="Models, recipes, targets and limits.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything is written.")] = Path(
        "secateurs-zoo"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted zoo; finished models stay.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run models without a verdict again.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Models at a time; half of the cores by default.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; `local` starts one here.")
    ] = None,
    warm: Annotated[
        bool,
        typer.Option("--warm", help="Fork models from a process that has imported torch: saves seconds per model."),
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdicts as JUnit XML too, for a CI server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the leaderboard as JSON instead of a table.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key of every recipe.")
    ] = None,
) -> None:
    """Prune many models, each in a process of its own, and write a leaderboard.

    A model that fails, crashes, hangs or takes too much memory leaves the others unharmed, and its row says so.
    """
    if retry_failed and not resume:
        raise UserError("`--retry-failed` goes with `--resume`; give both.")
    try:
        from secateurs_adapters.zoo import batch, spec
        from secateurs_adapters.zoo.executors import available_cores
    except ImportError as error:
        raise PluginError(
            f"`secateurs zoo` needs {error.name}, which is not installed; pip install 'secateurs[onnx]'."
        ) from None
    from secateurs_adapters.zoo.table import live_table

    cores = available_cores()
    workers = workers or max(1, cores // 2)
    threads = max(1, cores // workers)
    jobs = batch.make_jobs(spec.load_zoo(path, overrides or (), ctx.obj), output, threads=threads)
    work = batch.Batch(jobs, output)
    with live_table(jobs, work.results):
        work.run(_executor(ray, workers, warm, threads), resume=resume, retry_failed=retry_failed)
    _finish(work, junit, as_json)


def _executor(address: str | None, workers: int, warm: bool, threads: int) -> Execute:
    """Return what runs jobs: this machine, or a Ray cluster."""
    if address is None:
        from secateurs_adapters.zoo.executors import run_here

        return lambda jobs, done, tick: run_here(
            jobs, workers=workers, warm=warm, threads=threads, done=done, tick=tick
        )
    from secateurs_adapters.zoo.ray_executor import run_on_ray

    return lambda jobs, done, tick: run_on_ray(
        jobs, address=address, workers=workers, warm=warm, threads=threads, done=done, tick=tick
    )


def _finish(work: Batch, junit: Path | None, as_json: bool) -> None:
    """Print and write the leaderboard, and exit with its code: 0 if every verdict passes."""
    from rich.console import Console

    from secateurs_adapters.zoo.leaderboard import leaderboard_json
    from secateurs_adapters.zoo.table import leaderboard_table

    if junit is not None:
        from secateurs.files import write_text
        from secateurs_adapters.zoo.leaderboard import leaderboard_junit

        write_text(junit, leaderboard_junit(work.rows))
    if as_json:
        typer.echo(leaderboard_json(work.rows, work.results), nl=False)
    else:
        console = Console()
        console.print(leaderboard_table(work.rows))
        for name, reason in {row.name: row.reason for row in work.rows if row.reason}.items():
            console.print(f"{name}: {reason}", markup=False, soft_wrap=True)
        reused = f"{work.reused} of {len(work.jobs)} were finished before and are kept; " if work.reused else ""
        console.print(f"{reused}everything is in {work.output}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if all(row.status == "pass" for row in work.rows) else 1)
