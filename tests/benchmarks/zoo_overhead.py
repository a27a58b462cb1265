"""What a zoo costs beside its models' own work, in seconds per model, and whether that grows with the zoo.

Trivial models (a perceptron, one pass, the legacy exporter, nothing measured) are pruned by `secateurs zoo`, each in a process of its own.
A model's own work is what its process takes for the recipe, from after the imports until the report is written; overhead is the rest of what
the workers had:

    overhead = (wall * workers - sum of (work + waiting)) / models

It holds starting the zoo, hashing, starting processes, importing torch, watching and writing; for warm workers, importing torch once per
worker. Of some repeats the best counts: on a machine that others use too, noise only adds.

    python tests/benchmarks/zoo_overhead.py --output zoo_overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import ROOT, machine, versions, write

sys.path.insert(0, str(ROOT / "tests" / "zoo" / "trivial"))

import trivial_zoo

LIMITS = {"fresh": 2.5, "warm": 0.5}
"""Seconds per model that are allowed."""


def measure(models: int, workers: int, mode: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run a zoo and return its figures."""
    with tempfile.TemporaryDirectory(prefix="zoo-overhead-") as folder:
        file, output = trivial_zoo.write(Path(folder) / "zoo.yaml", models), Path(folder) / "out"
        command = [sys.executable, "-m", "secateurs", "zoo", str(file), "--output", str(output)]
        command += ["--workers", str(workers), *(["--warm"] if mode == "warm" else [])]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - began
        if done.returncode != 0:
            sys.exit(f"the zoo failed: {done.stdout}\n{done.stderr}")
        results = [json.loads(path.read_text()) for path in (output / "results").glob("*.json")]
    own = [result["work_seconds"] + result["waited_seconds"] for result in results]
    return {
        "mode": mode,
        "models": models,
        "workers": workers,
        "wall_seconds": wall,
        "work_seconds_median": statistics.median(result["work_seconds"] for result in results),
        "overhead_seconds_per_model": (wall * workers - sum(own)) / models,
        "limit_seconds": LIMITS[mode],
    }


def main() -> None:
    """Measure every mode at every size."""
    parser = argparse.ArgumentParser(description="Overhead of a zoo per model.")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the results go")
    parser.add_argument("--models", type=int, nargs="+", default=[20, 200], help="%(default)s")
    parser.add_argument("--modes", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="%(default)s")
    parser.add_argument("--workers", type=int, default=2, help="%(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="%(default)s")
    given = parser.parse_args()
    body: dict[str, Any] = {
        "benchmark": "zoo_overhead",
        "machine": machine(),
        "versions": versions("secateurs", "torch", "onnx", "pydantic"),
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="zoo-plugin-") as folder:
        environment = trivial_zoo.environment_with_plugin(Path(folder))
        for models in given.models:
            for _ in range(given.repeats):
                for mode in given.modes:  # in turn, so that a busy moment hits all of them
                    run = measure(models, given.workers, mode, environment)
                    print(f"{mode}, {models} models: {run['overhead_seconds_per_model']:.2f} s per model", flush=True)
                    body["runs"].append(run)
    body["best"] = best = {
        mode: {
            models: min(
                run["overhead_seconds_per_model"]
                for run in body["runs"]
                if (run["mode"], run["models"]) == (mode, models)
            )
            for models in given.models
        }
        for mode in given.modes
    }
    body["growth"] = {mode: of[max(given.models)] / of[min(given.models)] for mode, of in best.items()}
    body["within_limits"] = {mode: max(of.values()) <= LIMITS[mode] for mode, of in best.items()}
    write(given.output, body)


if __name__ == "__main__":
    main()
