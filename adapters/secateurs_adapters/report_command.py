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

_LARGEST = 64 * 2**20
"""Bytes of a `report.json` that is read."""


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
        DataError: it is missing, no plain file, larger than 64 MiB, or no report.
    """
    from pydantic import ValidationError

    from secateurs.report import Report

    path = folder / "report.json"
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{str(folder)!r} holds no `report.json`; give the output folder of `secateurs run`.")
    if (size := path.stat().st_size) > _LARGEST:
        raise DataError(f"{str(path)!r} has {size:,} bytes; a report has at most {_LARGEST:,}.")
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{str(path)!r} is no report of this version of Secateurs ({where}: {first['msg']}); run the recipe again."
        ) from None
