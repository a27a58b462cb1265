"""How well is memory planned, how finely do memory limits tell files apart, and does a target for peak memory lower the real peak?

Plan: seven networks at batch 1, 4 and 32. One session profiles a run and writes the graph that it ran; that graph is planned. The tensors of
every node are compared with the profile's `output_size`, and the planned peak (tensors, kernel scratch, packed weights, the arena's rounding)
with the profile's largest `mem_in_use_peak`.

Fits: the smallest memory limits under which ResNet-20 and ResNet-20 with half of its inner channels run, each found several times.

Target: ResNet-20 pruned by a recipe whose one target is `target_peak_memory: 0.8`; the peaks of both exports, as onnxruntime profiles them.

    python tests/benchmarks/memory_plan.py --output memory_plan.json
    python tests/benchmarks/memory_plan.py --output memory_plan.json --networks quickstart transformer --parts plan
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch

sys.path.insert(0, str(measuring.ROOT / "tests" / "adapters"))

import shipped

import secateurs
from secateurs.forward import to_dataset
from secateurs.settings import TargetSettings
from secateurs_adapters.datasets import NpzSettings, load_npz
from secateurs_adapters.export import dynamo
from secateurs_adapters.fits import RESOLUTION, find_fits
from secateurs_adapters.kernels import KernelTable
from secateurs_adapters.memory import profile_memory
from secateurs_adapters.planned import plan_memory
from secateurs_adapters.runtime_graph import written_model
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs

BATCHES = (1, 4, 32)
REQUIRED = {"over_profile": (1.0, 1.05), "gap_over_spread": 10, "target_ratio": 0.8}
"""From, to; at least; at most."""
NORMALISE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PASS = {"criteria": ["magnitude"], "refit": "none", "grid": 8, "held_out": 64, "target_peak_memory": 0.8}


def plan(file: Path, name: str, batch: int, folder: Path) -> dict[str, Any]:
    """Profile one run of a file, plan the graph that ran, and lay both side by side."""
    written = folder / f"{name}-{batch}.onnx"
    options = SessionOptions(memory_pattern=False, profile=folder / "profile", optimised=written)
    session = Session(file, options)
    session.run(seeded_inputs(session, batch))
    nodes = session.end_profiling()
    shape = (batch, *shipped.NETWORKS[name][1].inputs["input"].shape[1:])
    planned = plan_memory(written_model(written, file), {"input": shape}, KernelTable())
    profiled = max(int(node["mem_in_use_peak"]) for node in nodes)
    sizes = [int(node["output_size"]) for node in nodes]
    same = sum(step.output_bytes == size for step, size in zip(planned.steps, sizes, strict=True))
    return {
        "network": name,
        "batch": batch,
        "nodes": len(nodes),
        "nodes_with_equal_bytes": same,
        "tensor_bytes": planned.activation_bytes,
        "packed_bytes": planned.packed_bytes,
        "scratch_bytes": planned.scratch_bytes,
        "planned_bytes": planned.peak_bytes,
        "profiled_bytes": profiled,
        "over_profile": planned.peak_bytes / profiled,
        "unknown": list(planned.unknown),
    }


def fits(dense: Path, pruned: Path, repeats: int) -> dict[str, Any]:
    """Find the smallest limits of two files several times."""
    before, after = find_fits([dense, pruned], TargetSettings(memory_repeats=repeats))
    spread = max(before.spread_bytes or 0, after.spread_bytes or 0)
    gap = (before.fits_bytes or 0) - (after.fits_bytes or 0)
    return {
        "baseline_limits": before.limits,
        "candidate_limits": after.limits,
        "spread_bytes": spread,
        "resolution_bytes": RESOLUTION,
        "gap_bytes": gap,
        "gap_over_spread": gap / max(spread, RESOLUTION),
    }


def target(folder: Path) -> dict[str, Any]:
    """Prune ResNet-20 towards four fifths of its peak, and profile both exports at every batch size."""
    model = shipped.resnet20()
    settings = NpzSettings(file=measuring.DATA / "cifar10_lossless_train4k.npz", normalise=NORMALISE)
    images = torch.from_numpy(np.ascontiguousarray(load_npz(settings).take(np.arange(256)).inputs["input"]))
    result = secateurs.prune(model, images[:4], images.split(64), passes=[{"mi-nodes": PASS}])
    example = to_dataset(images[:4])
    peaks: dict[str, list[int | None]] = {}
    for side, network in (("baseline", model), ("candidate", result.model)):
        file = folder / f"{side}.onnx"
        dynamo(network, example, file, opset=20)
        peaks[side] = [profile_memory(file, TargetSettings(batch_size=batch)) for batch in BATCHES]
    pairs = zip(peaks["baseline"], peaks["candidate"], strict=True)
    return {
        "pass": PASS,
        "verdict": result.report.verdict,
        "widths": {n: m.out_channels for n, m in result.model.named_modules() if isinstance(m, torch.nn.Conv2d)},
        "batches": BATCHES,
        "profiled_bytes": peaks,
        "ratios": [after / before for before, after in pairs if before and after],
        "macs_ratio": result.report.ratios.macs,
    }


def main() -> None:
    """Measure the parts that were asked for and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the results go")
    parser.add_argument("--networks", nargs="+", choices=list(shipped.NETWORKS), default=list(shipped.NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=["plan", "fits", "target"], default=["plan", "fits", "target"])
    parser.add_argument("--repeats", type=int, default=5, help="of the fits-test (%(default)s)")
    given = parser.parse_args()
    if not measuring.available():
        sys.exit(f"skipped: {measuring.MISSING}")
    body: dict[str, Any] = {"benchmark": "memory_plan", "required": REQUIRED, "passes": {}}
    with tempfile.TemporaryDirectory(prefix="memory-plan-") as name:
        folder = Path(name)
        wanted = {"resnet20", "resnet20-pruned"} if "fits" in given.parts else set()
        wanted |= set(given.networks) if "plan" in given.parts else set()
        files = {network: shipped.export(network, folder / f"{network}.onnx") for network in sorted(wanted)}
        if "plan" in given.parts:
            rows = [plan(files[network], network, batch, folder) for network in given.networks for batch in BATCHES]
            body["plan"] = rows
            low, high = REQUIRED["over_profile"]
            body["passes"]["every node's bytes"] = all(row["nodes"] == row["nodes_with_equal_bytes"] for row in rows)
            body["passes"]["peak"] = all(low <= row["over_profile"] <= high for row in rows)
        if "fits" in given.parts:
            body["fits"] = found = fits(files["resnet20"], files["resnet20-pruned"], given.repeats)
            body["passes"]["fits"] = found["gap_over_spread"] > REQUIRED["gap_over_spread"]
        if "target" in given.parts:
            body["target"] = reached = target(folder)
            body["passes"]["target"] = reached["ratios"][0] <= REQUIRED["target_ratio"]
    body["machine"] = measuring.machine()
    body["versions"] = measuring.versions("onnxruntime", "onnx", "torch", "secateurs")
    measuring.write(given.output, body)
    print(body["passes"])


if __name__ == "__main__":
    main()
