"""The output folder of a run: what may lie in it, whose it is, and how far an interrupted run was.

Progress is kept in `.secateurs/` inside the folder; `state.json` there says whose folder it is and is written last, so that it never names
what is not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from secateurs import checkpoint, processes
from secateurs.digests import file_digest
from secateurs.errors import UserError
from secateurs.files import read_form, refuse_links, write_text
from secateurs.pipeline import Outcome, Session
from secateurs.plan import Plan
from secateurs.recipe import load_recipe
from secateurs.report import PassRecord, Report

__all__ = ["OUTPUTS", "PLANS", "STATE", "close_folder", "load_state", "open_folder", "save_state", "write_state"]

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
LASTING = ("plan.json", "model.safetensors", "baseline.onnx", "model.onnx")
"""Those without which a finished run is of no use."""
VARIANTS = ("{}.onnx.data", "{}.edge.*", "{}.quantised.*", "config.json")
"""What may lie beside `model.onnx` and `baseline.onnx`, by the first part of their names; the last makes `from_pretrained` fail there."""
PLANS = "plans"
"""The folder in it of the plans that a search tried."""
STATE = ".secateurs"
"""The folder in it of an interrupted run's state."""


def open_folder(output: Path, digest: str, *, resume: bool, overwrite: bool) -> Report | None:
    """Make the output folder ready; return the report if the run of this digest has been finished in it and is resumed.

    Args:
        output: the folder.
        digest: of the run; see `Recipe.digest`.
        resume: go on with an interrupted run of the same digest.
        overwrite: clear the files of an earlier run.

    Raises:
        UserError: the folder cannot be written, has a symbolic link, or holds something else than what was asked for; or a file of the
            finished run is missing, or is not the one that its verdict is about.
    """
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
    # Else it was killed before it had said whose folder this is.
    begun = state.exists() or any(name != STATE for name in content)
    if resume and begun:
        known = _digest_of(state) if state.exists() else _digest_of_finished(output)
        if known != digest:
            raise UserError(
                f"the output folder {str(output)!r} holds a run of another recipe, or its weights, its data or the code of its factory have "
                "changed; `--resume` needs all of them the same. Give `--overwrite` or another `--output`."
            )
        if not state.exists():
            found = Report.load(output / "report.json")
            _refuse_other_files(output)
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


def close_folder(output: Path) -> None:
    """Forget the state of a run that has ended."""
    (output / STATE / "state.json").unlink(missing_ok=True)  # first: it must never name what is gone
    shutil.rmtree(output / STATE, ignore_errors=True)


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


def _below(name: str) -> str:
    path = PureWindowsPath(name)  # which knows the separators of all systems
    if not name.isprintable() or len(name) > 255 or path.anchor or ".." in path.parts or ":" in name:
        raise ValueError("it must name a file below this folder")
    return name


_Below = Annotated[str, AfterValidator(_below)]


class _Hashed(BaseModel):
    sha256: str


class _Made(BaseModel):
    beside: dict[_Below, _Hashed] = Field(default_factory=dict)


class _Sidecar(BaseModel):
    """What is read here of the file that stands beside an ONNX file: hashes by name."""

    sha256: dict[_Below, str]
    made: _Made | None = None

    def hashes(self) -> dict[str, str]:
        beside = {} if self.made is None else self.made.beside
        return self.sha256 | {name: file.sha256 for name, file in beside.items()}


def _refuse_other_files(output: Path) -> None:
    """Refuse a finished run whose files are missing or have changed: its verdict is about others."""
    known: dict[str, str | None] = dict.fromkeys(LASTING)
    for sidecar in sorted(path for stem in ("model", "baseline") for path in output.glob(f"{stem}*.onnx.json")):
        known[sidecar.name.removesuffix(".json")] = None
        known.update(read_form(sidecar, _Sidecar, "description").hashes())
    for name, digest in known.items():
        file = output / name
        if file.is_file() and digest in (None, file_digest(file)):
            continue
        wrong = "has changed since it was measured" if file.is_file() else "is missing"
        raise UserError(
            f"the run in {str(output)!r} is finished, but its file {name!r} {wrong}, so that its verdict says nothing about what lies there. "
            "Make the run anew with `--overwrite`, or in another `--output`."
        )


def save_state(output: Path, digest: str, outcome: Outcome) -> None:
    """Keep what a resumed run needs; the file that names the state is written last."""
    if processes.is_main():
        checkpoint.save(outcome.model, outcome.plan, output / STATE / f"pass{len(outcome.records)}")
    write_state(output, digest, outcome)


def write_state(output: Path, digest: str, outcome: Outcome) -> None:
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


def load_state(output: Path, digest: str, session: Session) -> Outcome:
    """Return where an interrupted run of this digest stood, or the beginning where there was none."""
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
