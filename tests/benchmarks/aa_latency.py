"""Does the latency verdict tell the truth? The same file twice, many times over; and two files whose work differs by a tenth.

A/A: a file and its copy. The interval should hold 1, and hardly ever may it say "faster". A/B: a graph of ten equal convolutions, one of nine.
How much faster the second really is on this machine is measured first with many processes (`calibration`); a run finds the difference when its
interval lies below 1. Every run is written when it is done, with the load of the machine; started again with the same output, it goes on.

    python tests/benchmarks/aa_latency.py --output aa.json
    python tests/benchmarks/aa_latency.py --output aa.json --runs 4 --differing 2 --calibration 5      # a short try
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
import measuring

from secateurs.settings import TargetSettings
from secateurs_adapters.latency import measure_latency

CHANNELS, SIDE = 32, 24
REQUIRED = {"holds_one": (35, 40), "says_faster": (3, 40), "median_width": 0.06, "found": (18, 20)}
"""At least, at most, at most, at least; counts of so many runs."""


def convolutions(path: Path, count: int) -> Path:
    """Write a chain of equal convolutions, whose time is theirs alone to within a few per cent."""
    generator = np.random.default_rng(0)
    nodes, constants, last = [], [], "x"
    for number in range(count):
        weight = generator.normal(0, 0.05, (CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("Conv", [last, f"w{number}"], [f"c{number}"], kernel_shape=[3, 3], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last = f"r{number}"
    shape = ["batch", CHANNELS, SIDE, SIDE]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", last)]
    graph = helper.make_graph(nodes, "convolutions", value[:1], value[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def measure(baseline: Path, candidate: Path, settings: TargetSettings, seed: int) -> dict[str, Any]:
    """Measure two files once and return what the measurement said."""
    start = time.perf_counter()
    found = measure_latency(baseline, candidate, settings, seed=seed)
    low, high = found.ratio.ci95 or (0.0, float("inf"))
    return {
        "ratio": found.ratio.value,
        "low": low,
        "high": high,
        "width": high - low,
        "cv": found.baseline.latency.cv,
        "p50_ms": found.baseline.latency.p50,
        "seconds": time.perf_counter() - start,
        "load_average": measuring.machine()["load_average"],
    }


def resumed(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier start with the same protocol wrote, or what a first one begins with."""
    if not path.exists():
        return {"protocol": protocol, "required": REQUIRED, "calibration": [], "same": [], "differing": []}
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if body["protocol"] != protocol:
        sys.exit(f"{path} was measured by another protocol; give another --output.")
    return body


def summary(same: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what the intervals said."""
    return {
        "runs": len(same),
        "holds_one": sum(row["low"] <= 1 <= row["high"] for row in same),
        "says_faster": sum(row["high"] < 1 for row in same),
        "says_slower": sum(row["low"] > 1 for row in same),
        "median_width": statistics.median(row["width"] for row in same),
        "differing_runs": len(other),
        "found": sum(row["high"] < 1 for row in other),
        "differing_median_ratio": statistics.median(row["ratio"] for row in other),
        "differing_median_width": statistics.median(row["width"] for row in other),
    }


def passes(found: dict[str, Any]) -> dict[str, bool]:
    """Compare counts with what is required, in proportion where there were fewer runs."""
    share = found["runs"] / 40
    return {
        "holds_one": found["holds_one"] >= 35 * share,
        "says_faster": found["says_faster"] <= 3 * share,
        "median_width": found["median_width"] <= 0.06,
        "found": found["found"] >= 18 * found["differing_runs"] / 20,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--runs", type=int, default=40, help="of the same file (%(default)s)")
    parser.add_argument("--differing", type=int, default=20, help="of two files (%(default)s)")
    parser.add_argument(
        "--calibration", type=int, default=15, help="processes that measure the real difference (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=40, help="rounds per process (%(default)s)")
    options = parser.parse_args()
    settings = TargetSettings.model_validate({"repeats": options.repeats})
    careful = settings.model_copy(update={"processes": options.calibration, "repeats": 2 * options.repeats})
    protocol = {
        "processes": settings.processes,
        "repeats": settings.repeats,
        "warmup": settings.warmup,
        "batch_size": settings.batch_size,
        "calibration_processes": careful.processes,
        "files": "10 (9) convolutions, 32 channels, 3x3, on 24x24",
    }
    body = resumed(options.output, protocol)
    with tempfile.TemporaryDirectory() as folder:
        ten, copy, nine = (
            convolutions(Path(folder) / name, count) for name, count in (("a.onnx", 10), ("b.onnx", 10), ("c.onnx", 9))
        )
        parts = (
            ("calibration", nine, careful, 1),
            ("same", copy, settings, options.runs),
            ("differing", nine, settings, options.differing),
        )
        for name, other, how, count in parts:
            while len(rows := body[name]) < count:
                rows.append(measure(ten, other, how, len(rows)))
                last = rows[-1]
                print(
                    f"{name} {len(rows)} of {count}: {last['ratio']:.4f} [{last['low']:.4f}, {last['high']:.4f}]",
                    file=sys.stderr,
                )
                body["machine"] = measuring.machine()
                body["versions"] = measuring.versions("onnxruntime", "numpy", "secateurs")
                measuring.write(options.output, body)
    body["summary"] = summary(body["same"], body["differing"])
    body["passes"] = passes(body["summary"])
    measuring.write(options.output, body)
    print(body["summary"], body["passes"])


if __name__ == "__main__":
    main()
