"""`secateurs report`: draw the page of a finished run again. Light: what it needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateurs.errors import DataError, printable

if TYPE_CHECKING:
    from secateurs.report import Report

__all__ = ["read_report", "report"]


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of `secateurs run`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print where the page is and the verdict as JSON.")] = False,
) -> None:
    """Draw report.html again from the report.json of a run; the exit code is that of its verdict."""
    from secateurs_adapters.report_html import verdict_in_words, write_report_page

    found = read_report(folder)
    write_report_page(found, folder)
    page = folder / "report.html"
    if as_json:
        typer.echo(json.dumps({"page": str(page), "verdict": found.verdict, "reasons": found.reasons}, indent=2))
    else:
        typer.echo(printable(f"{page}: {verdict_in_words(found)}"))
    raise typer.Exit(0 if found.verdict == "pass" else 1)


def read_report(folder: Path) -> Report:
    """Read `report.json` of a folder.

    Raises:
        UserError: it is missing, no plain file, larger than 64 MiB, or no report.
    """
    from secateurs.report import Report

    path = folder / "report.json"
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{str(folder)!r} holds no `report.json`; give the output folder of `secateurs run`.")
    return Report.load(path)
