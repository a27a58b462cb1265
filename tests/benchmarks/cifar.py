"""Node pruning of CIFAR-10 ResNets: accuracy against MACs and against measured latency, a line per method, without and after training.

    python tests/benchmarks/cifar.py --output tests/benchmarks/results/cifar20.json --depth 20 --workers 2

Every row runs the recipe `examples/cifar_resnet.yaml` with another pass, through the code that `secateurs run` uses. The first rows differ in
nothing but the order in which units go (and `mi-nodes` in that it chooses between orders); the last show what refit and allocation are worth.
The file is written after each row, and rows that are in it already are kept: delete it to measure everything anew. A plot is written beside it.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import DATA, ROOT, arguments, machine, versions, write
from torch import nn

from secateurs import cost, runner
from secateurs.data import Dataset
from secateurs.forward import predict
from secateurs.intervals import mcnemar_p_value, paired_difference_interval
from secateurs.manager import create_manager
from secateurs.outputs import kl_divergence
from secateurs.pipeline import recover
from secateurs.recipe import load_recipe, parse_pass
from secateurs.settings import RecoverySettings, TargetSettings
from secateurs_adapters.latency import measure_latency

SAME: dict[str, Any] = {"allocation": "measured", "refit": "dense"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mi-nodes": ("mi-nodes", {}),
    "magnitude": ("magnitude", SAME),
    "taylor": ("taylor", SAME),
    "random": ("random-nodes", SAME),
    "magnitude, uniform, refitted": ("magnitude", {"allocation": "uniform", "refit": "dense"}),
    "magnitude, uniform, plain": ("magnitude", {"allocation": "uniform", "refit": "none"}),
}
"""Pass and options by the name of the row; `mi-nodes` is compared with each of the others."""
HOPELESS = "magnitude, uniform, plain"
"""What the plot leaves below its edge."""
RIVALS = ("magnitude", "taylor", "random")
"""The baselines with the same allocation and refit."""
IMAGES = {
    "lossless": (
        "cifar10_lossless_train4k.npz",
        "cifar10_lossless_test1k.npz",
        "weights_resnet{depth}_cifar10.safetensors",
    ),
    "jpeg": ("cifar10_jpeg_train10k.npz", "cifar10_jpeg_test.npz", "weights_resnet{depth}_cifar10_jpegft.safetensors"),
}
"""Where images to calibrate on, images to report on and weights come from."""
KEY = ("images", "depth", "method", "target", "seed", "epochs")
"""What tells rows apart."""
PROTOCOL = (
    "Recipe examples/cifar_resnet.yaml with one pass per row. Lossless: 1,024 calibration images of cifar10_lossless_train4k, validation cut "
    "from the same file, counts and KL(dense || pruned) in nats per image on the 1,000 images of cifar10_lossless_test1k. JPEG: the same with "
    "the weights tuned on JPEG images, calibration from cifar10_jpeg_train10k and the 10,000 images of cifar10_jpeg_test; the two sets are "
    "not comparable with each other. Rows of `random` with 3 seeds on the lossless images. `mi_nodes`: images lost and gained by mi-nodes "
    "against the row, with McNemar's exact two-sided p. Latency: the exported file on onnxruntime's CPU provider beside the dense one, one "
    "thread, ABBA in fresh processes. Trained rows: the same epochs of distillation for all, "
    "dense network included. Seconds are of the passes, while other rows ran beside."
)


def main() -> int:
    """Run every row and write."""
    given = arguments(
        __doc__ or "",
        depth=20,
        targets=[0.7, 0.5, 0.4],
        images=list(IMAGES),
        methods=list(METHODS),
        seeds=3,
        epochs=0,
        latency=1,
        workers=1,
    )
    tasks = [
        {
            "images": images,
            "depth": given.depth,
            "method": method,
            "target": target,
            "seed": seed,
            "epochs": given.epochs,
        }
        for images in given.images
        for target in given.targets
        for method in given.methods
        for seed in range(given.seeds if method == "random" and images == "lossless" else 1)
    ]
    rows: list[dict[str, Any]] = []
    if given.output.exists():
        rows = json.loads(given.output.read_text(encoding="utf-8"))["rows"]
    known = {tuple(row[name] for name in KEY) for row in rows}
    missing = [task for task in tasks if tuple(task[name] for name in KEY) not in known]
    body: dict[str, Any] = {
        "benchmark": "cifar",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "torch-pruning", "onnxruntime"),
        "depth": given.depth,
        "epochs": given.epochs,
    }
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for number, task in enumerate(missing):
            task["onnx"] = (
                str(Path(folder) / f"{number}.onnx") if given.latency and task["images"] == "lossless" else ""
            )
        for row in pool.map(run, missing):
            rows.append(row | latency(row.pop("onnx")))
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()
            write(given.output, finished(body, rows))
    write(given.output, finished(body, rows))
    draw(finished(body, rows), given.output.with_suffix(".png"))
    for text in summary(rows):
        sys.stdout.write(text + "\n")
    return 0


def finished(body: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of the file: every row compared with `mi-nodes`, and in words where that stands."""
    order = list(METHODS)
    rows.sort(key=lambda row: (row["images"] != "lossless", -row["target"], order.index(row["method"]), row["seed"]))
    for row in rows:
        row |= against(row, rows)
    return {**body, "rows": rows, "summary": summary(rows)}


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Return one row."""
    torch.set_num_threads(1)
    calibration, evaluation, weights = IMAGES[task["images"]]
    name, options = METHODS[task["method"]]
    overrides = [
        f"data_dir={DATA}",
        f"depth={task['depth']}",
        f"seed={task['seed']}",
        f"data.calibration.file={DATA / calibration}",
        f"data.evaluation.file={DATA / evaluation}",
        f"model.weights={DATA / weights.format(depth=task['depth'])}",
        f"recovery.epochs={task['epochs']}",
    ]
    recipe = load_recipe(ROOT / "examples" / "cifar_resnet.yaml", overrides)
    step = parse_pass({name: {**options, "target_macs": task["target"]}})
    prepared = runner.prepare(recipe.model_copy(update={"passes": (step,)}), create_manager())
    began = time.perf_counter()
    outcome = runner.dry_run(prepared).outcome
    seconds = time.perf_counter() - began
    session, data = prepared.session, prepared.evaluation
    assert data is not None
    dense, pruned = session.baseline, outcome.model
    if task["epochs"]:
        settings = RecoverySettings(epochs=task["epochs"])
        dense, pruned = (recover(session, copy.deepcopy(network), settings) for network in (dense, pruned))
    if task["onnx"]:
        export(prepared, dense, pruned, Path(task["onnx"]))
    record = outcome.records[0]
    return {
        **task,
        "pass": {name: step.options},
        **figures(dense, pruned, data),
        "macs_ratio": ratio(cost.macs, dense, pruned, session.roles.calibration.take([0])),
        "params_ratio": ratio(cost.parameters, dense, pruned, session.roles.calibration.take([0])),
        "seconds": seconds,
        "certificate": None if record.certificate is None else record.certificate.model_dump(mode="json"),
        "shortfalls": list(outcome.shortfalls),
    }


def figures(dense: nn.Module, pruned: nn.Module, data: Dataset) -> dict[str, Any]:
    """Return counts, the divergence, and which images are wrong."""
    assert data.labels is not None
    reference, outputs = predict(dense, data), predict(pruned, data)
    before, after = (values.argmax(1).numpy() == data.labels for values in (reference, outputs))
    return {
        "images_reported": len(data),
        "dense_right": int(before.sum()),
        "right": int(after.sum()),
        "kl": kl_divergence(reference, outputs),
        "against_dense": compare(before, after),
        "wrong_images": np.flatnonzero(~after).tolist(),
    }


def ratio(count: Any, dense: nn.Module, pruned: nn.Module, example: Dataset) -> float:
    """Return candidate over baseline."""
    return cost.total(count(pruned, example)) / cost.total(count(dense, example))


def export(prepared: runner.Prepared, dense: nn.Module, pruned: nn.Module, path: Path) -> None:
    """Write both networks as ONNX, `path` and the same with `.dense`."""
    example = prepared.session.roles.calibration.take(range(4))
    for network, file in ((pruned, path), (dense, path.with_suffix(".dense.onnx"))):
        prepared.exporter(network, example, file, opset=prepared.recipe.export.opset)


def latency(file: str) -> dict[str, Any]:
    """Return the measured latency ratio of a row's file to the dense one."""
    if not file:
        return {"latency_ratio": None, "latency_ci95": None}
    found = measure_latency(Path(file).with_suffix(".dense.onnx"), Path(file), TargetSettings())
    return {"latency_ratio": found.ratio.value, "latency_ci95": found.ratio.ci95}


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Return the paired comparison of two networks on the same images."""
    lost, gained = int((one & ~other).sum()), int((other & ~one).sum())
    interval = paired_difference_interval(lost, gained, len(one))
    return {"lost": lost, "gained": gained, "p_mcnemar": mcnemar_p_value(lost, gained), "drop_ci95": interval}


def against(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how `mi-nodes` does against a row of another method on the same images at the same target."""
    same = [
        r for r in rows if r["method"] == "mi-nodes" and (r["images"], r["target"]) == (row["images"], row["target"])
    ]
    if row["method"] == "mi-nodes" or not same:
        return {"mi_nodes": None}
    one, other = (~np.isin(np.arange(row["images_reported"]), r["wrong_images"]) for r in (row, same[0]))
    return {"mi_nodes": {**compare(one, other), "kl_lower": same[0]["kl"] < row["kl"]}}


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return in words where `mi-nodes` stands against the baselines with the same allocation and refit."""
    found = []
    for images in dict.fromkeys(row["images"] for row in rows):
        for rival in RIVALS:
            pairs = [
                row["mi_nodes"] for row in rows if (row["images"], row["method"]) == (images, rival) and row["mi_nodes"]
            ]
            if pairs:
                lower = sum(pair["kl_lower"] for pair in pairs)
                worse = sum(pair["lost"] > pair["gained"] and pair["p_mcnemar"] < 0.05 for pair in pairs)
                better = sum(pair["gained"] > pair["lost"] and pair["p_mcnemar"] < 0.05 for pair in pairs)
                found.append(
                    f"{images}: against {rival}, mi-nodes has the lower KL in {lower} of {len(pairs)} rows, is better at p < .05 in "
                    f"{better} and worse in {worse}"
                )
    return found


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    return (
        f"{row['images']:<9} {row['target']:<4} {row['method']:<30} seed {row['seed']}  {row['right']:5d} of {row['images_reported']} "
        f"(dense {row['dense_right']})  KL {row['kl']:.4f}  MACs {row['macs_ratio']:.3f}  {row['seconds']:.0f} s"
    )


def draw(body: dict[str, Any], path: Path) -> None:
    """Draw accuracy against MACs and against latency, a line per method; nothing where matplotlib is not installed."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    panels = []
    for images in dict.fromkeys(row["images"] for row in body["rows"]):
        rows = [row for row in body["rows"] if row["images"] == images]
        panels.append((rows, "macs_ratio", f"MACs left ({images} images)"))
        if any(row["latency_ratio"] for row in rows):
            panels.append((rows, "latency_ratio", "onnxruntime latency, CPU, 1 thread, ratio to the dense network"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (rows, key, label) in zip(axes[0], panels, strict=True):
        total = rows[0]["images_reported"]
        for method in dict.fromkeys(row["method"] for row in rows):
            points: dict[float, list[tuple[float, float]]] = {}
            for row in rows:
                if row["method"] == method and row[key]:
                    points.setdefault(row["target"], []).append((row[key], row["right"] / total))
            middle = sorted(tuple(np.mean(values, axis=0)) for values in points.values())
            axis.plot(
                *zip(*middle, strict=True), marker="o", label=method, linewidth=2.5 if method == "mi-nodes" else 1.2
            )
        axis.axhline(rows[0]["dense_right"] / total, color="grey", linestyle=":", label="dense")
        shown = [row["right"] / total for row in rows if row["method"] != HOPELESS]
        axis.set(xlabel=label, ylabel=f"accuracy, {total:,} test images", ylim=(min(shown, default=0) - 0.02, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(
        fontsize=8, title=f"below: {HOPELESS}" if any(row["method"] == HOPELESS for row in body["rows"]) else None
    )
    trained = f"after {body['epochs']} epochs of training" if body["epochs"] else "without training"
    figure.suptitle(f"ResNet-{body['depth']} on CIFAR-10, {trained}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
