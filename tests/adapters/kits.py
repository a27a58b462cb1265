"""Bundles for tests: two files with data that the first knows by heart, and an interpreter that sees only onnxruntime and numpy."""

import shutil
import subprocess
import sys
from pathlib import Path

import foreign
import numpy as np
import onnx
from onnx import numpy_helper

from secateurs.data import Dataset
from secateurs.settings import TargetSettings
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.bundle import write_bundle
from secateurs_adapters.session import Session

QUICK = ["--repeats", "4", "--warmup", "1", "--memory-repeats", "1"]


def make(folder, *, external=True):
    """A folder with a baseline and a candidate, one with its weights beside it, and labelled data that the baseline knows."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    x = generator.normal(size=(37, 3, 10, 10)).astype(np.float32)
    foreign.image(folder / "baseline.onnx", 17, shape=("N", 3, 10, 10))
    model = onnx.load(str(folder / "baseline.onnx"))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=external, location="model.data", size_threshold=0
    )
    labels = Session(folder / "baseline.onnx").run({"x": x})["y"].argmax(1)
    np.savez(folder / "data.npz", x=x, labels=labels)
    return Dataset({"x": x}, labels, "made")


def made_of(folder):
    """Write a bundle of what `make` makes, in a folder of its own beside that."""
    data = make(folder / "out")
    files = [read_artifact(folder / "out" / name) for name in ("baseline.onnx", "model.onnx")]
    write_bundle(*files, folder / "kit", data=data, labelled=True, target=TargetSettings(batch_size=4, threads=2))
    return folder / "kit"


def bare(folder):
    """Link onnxruntime and numpy into a folder of their own."""
    folder.mkdir()
    for package in ("onnxruntime", "numpy", "numpy.libs"):
        for place in map(Path, sys.path):
            if (place / package).is_dir():
                (folder / package).symlink_to(place / package)
                break
    return folder


def measure(kit, site, *arguments):
    command = [sys.executable, "-S", "-P", str(kit / "measure.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(site)}, timeout=300
    )


def copy(kit, folder):
    """Copy a bundle, so that a test may damage it."""
    return Path(shutil.copytree(kit, folder))
