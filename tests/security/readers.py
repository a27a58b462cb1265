"""Every reader of files that others may have written, each with good files to start from; shared by the properties and the fuzzer.

A reader is called with the path of a file and must return, or raise a `SecateursError`; anything else is a crash.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from onnx import TensorProto, helper
from torch import nn

from secateurs import checkpoint
from secateurs.errors import SecateursError
from secateurs.files import read_form
from secateurs.plan import AddBias, DropBlock, Plan, RemoveUnits, SetAttribute, Slice
from secateurs.recipe import load_recipe
from secateurs.report import Environment, PassRecord, Ratios, Report, Side
from secateurs.surgery import applied
from secateurs_adapters.artifact import graph_signature, read_artifact
from secateurs_adapters.data_settings import ImageFolderSettings, NpzSettings, TsvSettings
from secateurs_adapters.datasets import _decode, _read_table, load_npz
from secateurs_adapters.measured import _Manifest, _read, read_result
from secateurs_adapters.models import load_weights
from secateurs_adapters.npz import read_arrays
from secateurs_adapters.report_html import render
from secateurs_adapters.zoo.results import Job, Result
from secateurs_adapters.zoo.spec import load_zoo

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Attributes:
        name: of the kind.
        suffix: of its files.
        read: called with a path.
        good: contents that it reads.
    """

    name: str
    suffix: str
    read: Callable[[Path], object]
    good: tuple[bytes, ...]

    def survives(self, path: Path) -> bool:
        """Return whether a file is read; a refusal in words is False, and anything else goes on as it is."""
        try:
            self.read(path)
        except SecateursError:
            return False
        return True


def small() -> nn.Module:
    """Return a network that plans and weights are tried on."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))


def _plan(path: Path) -> None:
    applied(small(), Plan.load(path))


def _report(path: Path) -> None:
    report = Report.load(path)
    report.to_json()
    render(report)


def _weights(path: Path) -> None:
    try:
        load_weights(small(), path)
    except SecateursError:
        checkpoint.load_weights(small(), path)


def _npz(path: Path) -> None:
    try:
        load_npz(NpzSettings(file=path, max_bytes=2**20))
    except SecateursError:
        read_arrays(path, None, 2**20)


def _onnx(path: Path) -> None:
    read_artifact(path)
    graph_signature(path)


def _zoo_result(path: Path) -> None:
    job = Job(
        name="a",
        key="k",
        recipe="",
        source="r.yaml",
        output=path.parent,
        directory=path.parent,
        environment="",
        timeout=1,
        memory_mib=None,
        retries=0,
        threads=1,
    )
    job.result_path.parent.mkdir(exist_ok=True)
    job.result_path.write_bytes(path.read_bytes())
    job.result()


def _table(path: Path) -> None:
    _read_table(path, TsvSettings(file=path, tokenizer="none"))


def _image(path: Path) -> None:
    _decode(path, ImageFolderSettings(folder=path.parent, size=(4, 4)))


def _good_plan() -> bytes:
    piece = Slice(module="0", parameter="weight", dim=0, removed=(1,))
    edits = (
        RemoveUnits(root="0", units=(1,), slices=(piece,), reason="a"),
        SetAttribute(module="0", name="out_channels", value=3),
        AddBias(module="0"),
        DropBlock(path="2", reason="b"),
    )
    return Plan(edits=edits).to_json().encode()


def good_report() -> Report:
    """Return a report with a pass."""
    side = Side(params=100, macs=1000)
    environment = Environment(versions={"python": "3"}, cpu="a", threads=1, seed=0, git=None)
    record = PassRecord(name="mi-nodes", settings={"a": 1}, edits=1, skipped=[], certificate=None, seconds=1.0)
    return Report(
        verdict="pass",
        baseline=side,
        candidate=side,
        ratios=Ratios(params=1.0),
        passes=[record],
        environment=environment,
    )


def _good_npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2))
    return file.getvalue()


def _good_onnx() -> bytes:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    outside = helper.make_tensor("v", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "v.data"), ("offset", "0"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Add", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "v"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight, outside])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())


def _good_picture(kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, kind)
    return file.getvalue()


def _good_result() -> bytes:
    timed = {"session_ms": 1.0, "first_run_ms": 1.0, "samples_ms": [1.0, 2.0]}
    both = {"baseline": timed, "candidate": timed}
    peak = [{"anonymous": 1, "resident": 1, "reason": ""}]
    differs = {"max_abs": 0.0, "max_rel": 0.0, "outputs": {"y": 0.0}, "holds": True}
    placed = {"nodes": {"CPUExecutionProvider": 2}, "microseconds": {}, "registered": "CPUExecutionProvider"}
    body = {
        "schema_version": 1,
        "manifest_sha256": "0" * 64,
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "batch_size": 1,
        "environment": {"python": "3"},
        "correctness": {"baseline": differs, "candidate": differs},
        "accuracy": {"n": 9, "baseline_right": 5, "candidate_right": 5, "lost": 1, "gained": 1},
        "latency": [both] * 5,
        "memory": {"base": peak, "baseline": peak, "candidate": peak},
        "placement": {"baseline": placed, "candidate": placed},
        "seconds": 1.0,
    }
    return json.dumps(body).encode()


def readers() -> list[Reader]:
    """Return all readers; the last of a reader's good files may name files that are not there."""
    recipe = (ROOT / "examples" / "quickstart.yaml").read_bytes()
    zoo = (ROOT / "examples" / "zoo.yaml").read_bytes()
    manifest = {
        "schema_version": 1,
        "models": {"baseline": "a.onnx", "candidate": "b.onnx"},
        "labels": None,
        "examples": 1,
        "batch_size": 1,
        "sequence_length": None,
        "tolerance": 0.1,
        "files": {"a.onnx": {"sha256": "0" * 64, "bytes": 1}},
    }
    found = {"name": "a", "key": "k", "status": "pass", "timeout": 1.0, "recipe": "r", "folder": "models/a", "log": "l"}
    return [
        Reader("recipe", ".yaml", load_recipe, (recipe, b"{model: {factory: a:b}, data: {}, passes: [mi-nodes]}")),
        Reader("zoo", ".yaml", load_zoo, (zoo, b"{entries: [{name: a, recipe: r.yaml}]}")),
        Reader("plan", ".json", _plan, (_good_plan(), b'{"schema_version": 1, "edits": []}')),
        Reader("report", ".json", _report, (good_report().to_json().encode(),)),
        Reader("result", ".json", read_result, (_good_result(),)),
        Reader("manifest", ".json", lambda path: _read(path, _Manifest), (json.dumps(manifest).encode(),)),
        Reader("job", ".json", _zoo_result, (json.dumps(found).encode(),)),
        Reader("zoo result", ".json", lambda path: read_form(path, Result, "result"), (json.dumps(found).encode(),)),
        Reader("safetensors", ".safetensors", _weights, (safetensors.torch.save(small().state_dict()),)),
        Reader("npz", ".npz", _npz, (_good_npz(),)),
        Reader("onnx", ".onnx", _onnx, (_good_onnx(),)),
        Reader("table", ".tsv", _table, (b"a text\t1\nanother\t0\n",)),
        Reader("image", ".png", _image, tuple(_good_picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP"))),
    ]


torch.set_num_threads(1)
