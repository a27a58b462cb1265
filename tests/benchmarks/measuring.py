"""What the benchmarks share: where the data are, fair repeats, and results as JSON with everything needed to repeat them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FILES = ("weights_resnet20_cifar10.safetensors", "cifar10_lossless_train4k.npz", "cifar10_lossless_test1k.npz")
"""What both benchmarks read."""
MISSING = "the data folder shared/data beside the repository is not here"

sys.path.insert(0, str(ROOT / "examples"))


def available() -> bool:
    """Tell whether the data are here."""
    return all((DATA / name).exists() for name in FILES)


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """Read `--output` and one option per default; end with the reason where the data are missing."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the results go")
    for name, value in defaults.items():
        kind = type(value[0] if isinstance(value, list) else value)
        parser.add_argument(
            f"--{name}", type=kind, default=value, nargs="+" if isinstance(value, list) else None, help="%(default)s"
        )
    given = parser.parse_args()
    if not available():
        sys.exit(f"skipped: {MISSING}")
    return given


def alternate(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Return seconds per call of each function, called in turn, so that a busy moment hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number >= warmup:
                samples[name].append(time.perf_counter() - began)
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each list."""
    return {name: statistics.median(values) for name, values in samples.items()}


def machine() -> dict[str, Any]:
    """Return processor, cores, system and load; neither names nor paths."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system(), "load_average": load}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of distributions."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def write(path: Path, body: Mapping[str, Any]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
