"""A folder that measures itself on a device: both models, inputs, the outputs to expect, and a script that needs only onnxruntime and numpy.

Everything is laid down here the way the device will feed it, run by run, so that the script (`measure.py`) needs to know nothing about
examples, axes or metrics. `manifest.json` has the hash of every file; the script and `secateurs validate --measured` refuse what does not
match.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from secateurs.errors import DataError
from secateurs.settings import TargetSettings
from secateurs.tables import counted
from secateurs_adapters.one_node import ONE_NODE
from secateurs_adapters.session import Session, seeded_inputs

if TYPE_CHECKING:
    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact

__all__ = ["MANIFEST", "TOLERANCE", "write_bundle"]

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

MANIFEST = "manifest.json"
TOLERANCE = 1e-3
"""Largest difference on the device, as a share of an output's largest value; processors round and sum in their own ways."""
SEEDED_EXAMPLES = 64
_CODE = (".py", ".pyc", ".pyd", ".pyw", ".so")
_OWN = (
    MANIFEST,
    "base.onnx",
    "first.npz",
    "inputs.npz",
    "labels.npy",
    "reference_baseline.npz",
    "reference_candidate.npz",
    "README.txt",
    "result.json",
)
_README = """Measure the two models of this folder on this device:

    pip install "onnxruntime>=1.22" numpy
    python measure.py

It measures on {provider} with {threads}; `--provider` and `--threads` take others.
It writes result.json. Bring that file back into this folder where it was made, and ask for the verdict:

    secateurs validate --measured result.json --budget budget.yaml
"""


def write_bundle(
    baseline: Artifact,
    candidate: Artifact,
    folder: Path,
    *,
    data: Dataset | None = None,
    labelled: bool = False,
    target: TargetSettings | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Write the folder, whole or not at all.

    Args:
        baseline: the file before; both lie in one folder.
        candidate: the file after.
        folder: where to write; must not exist, or be empty.
        data: examples to run; None makes 64 seeded ones from the signature.
        labelled: count right answers on the device: the largest of the first output's scores is compared with the label.
        target: provider, its options and threads, which the device takes unless told otherwise; examples per run, where the files leave
            that free; size of free axes other than the batch in seeded inputs. None is one thread of the CPU, one example.
        tolerance: see `TOLERANCE`.

    Returns:
        The manifest.

    Raises:
        DataError: the folder has content, or the files and the data do not fit each other.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{str(folder)!r} is there already and has content; give a new folder.")
    files = list(dict.fromkeys((*baseline.files, *candidate.files)))
    _refuse_names(file.relative_to(baseline.path.parent) for file in files)
    target = target or TargetSettings()
    before, after = Session(baseline.path), Session(candidate.path)
    size = before.fixed_batch() or target.batch_size
    feeds = _seeded_feeds(before, size, target.sequence_length) if data is None else _data_feeds(before, data, size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        made = Path(name) / "kit"
        made.mkdir()
        for file in files:
            place = made / file.relative_to(baseline.path.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        names = _write_arrays(made, before, after, feeds)
        labels = None if data is None or not labelled else _labels(made, data, before)
        manifest = {
            "schema_version": 1,
            "models": {"baseline": baseline.path.name, "candidate": candidate.path.name},
            "weight_bytes": {"baseline": baseline.weight_bytes, "candidate": candidate.weight_bytes},
            "inputs": [spec.name for spec in before.inputs],
            "references": names,
            "labels": labels,
            "example_axis": before.example_axes()[before.outputs[0]] or 0,
            "examples": SEEDED_EXAMPLES if data is None else len(data),
            "origin": "seeded" if data is None else data.origin,
            "batch_size": size,
            "sequence_length": target.sequence_length if data is None and before.signature.has_lengths() else None,
            "tolerance": tolerance,
            "provider": target.provider,
            "options": target.options,
            "threads": target.threads,
        }
        _write_rest(made, manifest)
        if folder.exists():
            folder.rmdir()
        made.replace(folder)
    return manifest


def _refuse_names(names: Iterable[Path]) -> None:
    """Refuse files that the device's Python would import beside `measure.py`, or that would be overwritten by the folder's own.

    Raises:
        DataError: there is one.
    """
    for name in names:
        if name.suffix.lower() in _CODE or name.as_posix() in _OWN:
            raise DataError(
                f"a file of the network is called {name.as_posix()!r}, which a bundle cannot hold: it is a name of code, or of a file of the "
                "bundle itself. Save the network again with its data in a `.data` file."
            )


def _write_rest(folder: Path, manifest: dict[str, Any]) -> None:
    script = importlib.resources.files("secateurs_adapters").joinpath("measure.py").read_bytes()
    (folder / "measure.py").write_bytes(script)
    threads = counted(manifest["threads"], "thread")
    (folder / "README.txt").write_text(_README.format(provider=manifest["provider"], threads=threads), encoding="utf-8")
    (folder / "base.onnx").write_bytes(ONE_NODE)
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_arrays(folder: Path, before: Session, after: Session, feeds: list[Feed]) -> dict[str, list[str]]:
    """Write the inputs and what both files make of them, one row per run; return the names of the outputs that are kept."""
    names = [spec.name for spec in before.inputs]
    if sorted(names) != sorted(spec.name for spec in after.inputs):
        raise DataError(
            f"{before.path.name!r} takes the inputs {names} and {after.path.name!r} {[spec.name for spec in after.inputs]}; a bundle compares "
            "two files with the same inputs."
        )
    np.savez(folder / "first.npz", **_numbered("i", [feeds[0][name] for name in names]))
    np.savez(folder / "inputs.npz", **_numbered("i", [np.stack([feed[name] for feed in feeds]) for name in names]))
    kept = {}
    for side, session in (("baseline", before), ("candidate", after)):
        runs = [session.run(feed) for feed in feeds]
        found = {name: [run[name] for run in runs] for name in session.outputs}
        fixed = {name: values for name, values in found.items() if _stackable(values)}
        if session.outputs[0] not in fixed:
            raise DataError(
                f"the first output {session.outputs[0]!r} of {session.path.name!r} is no tensor of numbers with one shape for all inputs, so "
                "there is nothing to compare on a device."
            )
        np.savez(folder / f"reference_{side}.npz", **_numbered("o", [np.stack(values) for values in fixed.values()]))
        kept[side] = list(fixed)
    return kept


def _numbered(prefix: str, arrays: list[Array]) -> dict[str, Any]:
    """Return arrays under plain names: those of a graph may hold anything."""
    return {f"{prefix}{number}": array for number, array in enumerate(arrays)}


def _stackable(values: list[Any]) -> bool:
    return all(
        isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.shape == values[0].shape
        for value in values
    )


def _seeded_feeds(session: Session, size: int, length: int | None) -> list[Feed]:
    return [seeded_inputs(session, size, seed, length) for seed in range(-(-SEEDED_EXAMPLES // size))]


def _data_feeds(session: Session, data: Dataset, size: int) -> list[Feed]:
    """Return the data run by run; the last run is filled up by repeating its last example."""
    starts = range(0, len(data), size)
    rows = [np.arange(start, start + size).clip(max=len(data) - 1) for start in starts]
    return [session.feeds({name: array[row] for name, array in data.inputs.items()}) for row in rows]


def _labels(folder: Path, data: Dataset, session: Session) -> str | None:
    """Write the labels if right answers can be counted by the largest score: one integer per example, and one row of scores."""
    labels = data.labels
    scores = len(session.output_specs()[0].shape) == 2 and session.example_axes()[session.outputs[0]] is not None
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or not scores:
        return None
    np.save(folder / "labels.npy", labels)
    return "labels.npy"
