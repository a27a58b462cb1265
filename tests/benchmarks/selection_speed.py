"""What choosing half of the 11,456 removable units of a ResNet-50 costs: by closed form in float64, beside an estimate for paper mode.

    python tests/benchmarks/selection_speed.py --output tests/benchmarks/results/selection_speed.json

Weights and images are random: the arithmetic is that of the real network. The statistics are gathered by the code that `mi-nodes` uses.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import arguments, machine, versions, write
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.data import Dataset
from secateurs.groups import Group, find_groups
from secateurs.layers import weight_matrix
from secateurs.passes.ordering import Dropped, Scoring, from_output_to_input, predicted_order
from secateurs.passes.survey import Survey
from secateurs.predictive import observed_readings, seconds_per_training, trainings
from secateurs.refit import refittable
from secateurs.rows import reader_moments
from secateurs.settings import MiNodesSettings

BUDGET = 60.0
"""Seconds that the selection may take."""
SLACK = 1.05
"""The statistics of 64 batches may take this many times the memory of those of 4."""
WIDEST = 2304
"""Columns of the layers whose statistics are swept for their memory."""
INNER, COUPLED = 7552, 3904
"""Units that one layer produces, and units of residual streams."""
TIMED = "layer1.0.conv2"
"""The group on which paper mode is really run."""
PROTOCOL = (
    "A ResNet-50 with random weights and BatchNorm statistics that fit them; random smooth images of 224 x 224. Selection: the removal "
    "orders of every group down to half of its units, in float64, from moments that are there; `information` alone, and all orders of the "
    "default. Statistics: one sweep. Peak memory is that of the whole process. Growth: two fresh processes that hold the same 64 batches of "
    "4 images of 64 x 64 and sweep over 4 or all of them, at all layers that read at most 2,304 columns. Paper mode: one group really run, "
    "and the sum over all groups and readers of trainings times the seconds of one training of that size."
)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNet50(nn.Module):
    """The layer sizes of ResNet-50 (He et al. 2016), stride in the 3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            made = []
            for block in range(blocks):
                made.append(Bottleneck(inputs, width, 2 if stage > 1 and not block else 1))
                inputs = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*made))
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def images(count: int, size: int) -> Dataset:
    """Return smooth random images."""
    values = np.random.default_rng(0).normal(size=(count, 3, size, size)).astype(np.float32)
    return Dataset({"input": values + np.roll(values, 1, -1) + np.roll(values, 1, -2)})


def network() -> nn.Module:
    """Return the network with the BatchNorm statistics of a few images."""
    torch.manual_seed(0)
    model = ResNet50().train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.from_numpy(images(16, 64).inputs["input"]))
    return model.eval()


def main() -> int:
    """Measure and write; the exit code tells whether the budget holds and memory does not grow."""
    if "--sweep" in sys.argv:
        return sweep_alone(int(sys.argv[-1]))
    given = arguments(__doc__ or "", threads=2, images=128, repeats=3)
    torch.set_num_threads(given.threads)
    growth = {str(batches): peak_of_sweep(batches) for batches in (4, 64)}
    model, data = network(), images(given.images, 224)
    groups, skipped = find_groups(model, data.take(range(2)))
    began = time.perf_counter()
    survey = Survey(model, groups, data, 0)
    statistics = {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak()}
    runs = [selection(survey) for _ in range(given.repeats)]
    body = {
        "benchmark": "selection_speed",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy"),
        "threads": given.threads,
        "images": given.images,
        "units": {"inner": units(groups, coupled=False), "coupled": units(groups, coupled=True)},
        "skipped": [item.where for item in skipped],
        "statistics": statistics,
        "budget_seconds": BUDGET,
        "selection": runs,
        "peak_memory_bytes": peak(),
        "paper_mode": paper_mode(survey, data),
        "growth": {"peak_memory_bytes": growth, "slack": SLACK},
    }
    write(given.output, body)
    best = min(run["information_seconds"] for run in runs)
    sys.stdout.write(f"selection {best:.1f} s, paper mode about {body['paper_mode']['all_groups_hours']:.1f} h\n")
    whole = body["units"] == {"inner": INNER, "coupled": COUPLED}
    return 0 if best <= BUDGET and growth["64"] <= SLACK * growth["4"] and whole else 1


def units(groups: list[Group], *, coupled: bool) -> int:
    """Return the units of groups that one layer produces, or of the others."""
    return sum(group.units for group in groups if (len(group.of("out")) > 1 or group.root == "conv1") == coupled)


def selection(survey: Survey) -> dict[str, Any]:
    """Return the seconds of the removal orders, half of each group's units."""
    load, seconds = os.getloadavg()[0], {}
    for name, criteria in (
        ("information", ("information",)),
        ("all_orders", ("information", "residual", "magnitude")),
    ):
        scoring = Scoring(survey, MiNodesSettings(criteria=criteria))
        began, processor = time.perf_counter(), time.process_time()
        for group in from_output_to_input(survey):
            orders = scoring.orders(group, keep=group.units // 2)
            assert all(len(order.units) >= group.units // 2 for order in orders.values())
        seconds[f"{name}_seconds"] = time.perf_counter() - began
        seconds[f"{name}_processor_seconds"] = time.process_time() - processor
    return {**seconds, "load_average_before": round(load, 2)}


def paper_mode(survey: Survey, data: Dataset) -> dict[str, Any]:
    """Return the time of one group, and of all by the time of a single training of each size."""
    settings = MiNodesSettings(estimator="mlp")
    [group] = [group for group in survey.groups if group.root == TIMED]
    names = [member.module for member in group.of("in")]
    rows = observed_readings(survey.model, names, data)
    began = time.perf_counter()
    order = predicted_order(survey, group, rows, settings, Dropped(), 0)
    measured = time.perf_counter() - began
    total, count, known = 0.0, 0, dict[tuple[int, ...], float]()
    for other in survey.groups:
        for member in other.of("in"):
            p, d = weight_matrix(survey.model.get_submodule(member.module)).shape
            if (d, p) not in known:
                known[d, p] = seconds_per_training(d, p, repeats=settings.repeats)
            count += trainings(other.units, 1, settings.repeats)
            total += trainings(other.units, 1, settings.repeats) * known[d, p]
    [reader] = names
    p, d = weight_matrix(survey.model.get_submodule(reader)).shape
    return {
        "group": TIMED,
        "group_units": group.units,
        "group_removed": order.removable,
        "group_trainings": trainings(group.units, 1, settings.repeats),
        "group_seconds": measured,
        "group_seconds_estimated": trainings(group.units, 1, settings.repeats) * known[d, p],
        "all_groups_trainings": count,
        "all_groups_hours": total / 3600,
    }


def peak() -> int:
    """Return the peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of_sweep(batches: int) -> int:
    """Return the peak memory of a fresh process that gathers statistics from some batches."""
    command = [sys.executable, str(Path(__file__)), "--sweep", str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["peak_memory_bytes"])


def sweep_alone(batches: int) -> int:
    """Gather the statistics of every reader from the first batches, and print the peak memory."""
    model, data = network(), images(256, 64)
    names = [
        name for name, layer in model.named_modules() if refittable(layer) and weight_matrix(layer).shape[1] <= WIDEST
    ]
    reader_moments(model, names, data.take(range(4 * batches)), batch_size=4)
    sys.stdout.write(json.dumps({"peak_memory_bytes": peak()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
