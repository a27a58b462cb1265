"""What a CKA sweep costs: all nine blocks of ResNet-20 on 512 CIFAR-10 images, beside plain forward passes and beside torch_cka.

    python tests/benchmarks/cka_sweep.py --output tests/benchmarks/results/cka_sweep.json --threads 1 2

The values are compared with a float64 implementation by another formula (Song et al.'s three terms, one pair at a time) and with torch_cka's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import DATA, alternate, arguments, machine, medians, versions, write
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.passes.depth import cka_matrix
from secateurs.probe import sweep
from secateurs.similarity import CkaAccumulator
from secateurs_adapters.datasets import NpzSettings, load_npz
from secateurs_adapters.models import load_factory

IMAGES, BATCH = 512, 64
LAYERS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
BUDGET = 1.20
"""The sweep may take this many times as long as the plain forward passes."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Layouts of the images in memory: PyTorch's usual one, and the one that reading images as NHWC gives, whose convolutions are faster."""
PROTOCOL = (
    "ResNet-20 in evaluation mode without gradients, 512 images in batches of 64 on all sides. Plain forward passes and the sweep "
    "alternate, after 2 warm-up rounds. torch_cka compares a copy of the network with itself, without gradients, on the same batches; "
    "setting it up is not timed. Time in hooks: an extra series with a clock around each tap and each end of a batch. Seconds; ratios "
    "are ratios of medians."
)


def main() -> int:
    """Measure and write; the exit code tells whether the budget holds."""
    given = arguments(__doc__ or "", repeats=15, rivals=3, threads=[1], layouts=list(LAYOUTS))
    normalise = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    file = DATA / "cifar10_lossless_train4k.npz"
    data = load_npz(NpzSettings.model_validate({"file": file, "normalise": normalise})).take(range(IMAGES))
    weights = DATA / "weights_resnet20_cifar10.safetensors"
    model = load_factory("cifar_resnet:build", arguments={"depth": 20}, weights=weights, folder=DATA).eval()
    runs = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for layout in given.layouts:
            images = torch.from_numpy(data.inputs["input"]).contiguous(memory_format=LAYOUTS[layout]).numpy()
            load = os.getloadavg()[0]
            figures = measure(model, Dataset({"input": images}), given.repeats, given.rivals)
            runs.append({"threads": threads, "layout": layout, "load_average_before": round(load, 2), **figures})
    body = {
        "benchmark": "cka_sweep",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "torch-cka"),
        "layers": LAYERS,
        "budget_ratio": BUDGET,
        "runs": runs,
        "accuracy": accuracy(model, data),
    }
    write(given.output, body)
    for run in runs:
        sys.stdout.write(
            f"{run['threads']} threads, {run['layout']}: {run['ratio_sweep_to_forward']:.3f} x the forward pass\n"
        )
    return 0 if all(run["within_budget"] for run in runs) else 1


def measure(model: nn.Module, data: Dataset, repeats: int, rivals: int) -> dict[str, Any]:
    """Return all timings with the threads that are set."""
    batches = tensors(data)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    samples = alternate(
        {"forward": forward, "sweep": lambda: cka_matrix(model, LAYERS, data, batch_size=BATCH)}, repeats=repeats
    )
    samples["torch_cka"] = [rival(model, batches)[0] for _ in range(rivals)]
    samples["in_hooks"] = [in_hooks(model, data) for _ in range(5)]
    middle = medians(samples)
    ratio = middle["sweep"] / middle["forward"]
    return {
        "seconds": samples,
        "medians": middle,
        "ratio_sweep_to_forward": ratio,
        "median_of_paired_ratios": statistics.median(
            b / a for a, b in zip(samples["forward"], samples["sweep"], strict=True)
        ),
        "ratio_torch_cka_to_sweep": middle["torch_cka"] / middle["sweep"],
        "overhead_ratio_torch_cka_to_sweep": (middle["torch_cka"] - middle["forward"])
        / (middle["sweep"] - middle["forward"]),
        "within_budget": ratio <= BUDGET,
    }


def tensors(data: Dataset) -> list[Tensor]:
    """Return the batches as tensors."""
    return [torch.from_numpy(batch.inputs["input"]) for batch in data.batches(BATCH)]


def rival(model: nn.Module, batches: list[Tensor]) -> tuple[float, Tensor]:
    """Return the seconds and the values of one comparison by torch_cka, on a copy because its hooks stay."""
    from torch.utils.data import DataLoader, TensorDataset
    from torch_cka import CKA

    loader = DataLoader(TensorDataset(torch.cat(batches)), batch_size=BATCH)
    twin = copy.deepcopy(model)
    comparison = CKA(twin, twin, "first", "second", list(LAYERS), list(LAYERS))
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        comparison.compare(loader, loader)
        seconds = time.perf_counter() - began
    return seconds, comparison.export()["CKA"].double()


def in_hooks(model: nn.Module, data: Dataset) -> float:
    """Return the seconds that one sweep spends in the taps and at the ends of batches."""
    accumulator, spent = CkaAccumulator(LAYERS), [0.0]

    def clocked(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            began = time.perf_counter()
            function(*args)
            spent[0] += time.perf_counter() - began

        return call

    taps = {name: clocked(accumulator.tap(name)) for name in LAYERS}
    sweep(model, data, taps, batch_size=BATCH, after_batch=clocked(accumulator.end_batch))
    return spent[0]


def accuracy(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """Return the largest differences of our values from the naive ones and from torch_cka's."""
    ours = cka_matrix(model, LAYERS, data, batch_size=BATCH)
    expected = naive(model, data)
    _, other = rival(model, tensors(data))
    return {
        "max_abs_difference_naive_float64": float((ours - expected).abs().max()),
        "max_abs_difference_torch_cka": float((ours - other).abs().max()),
        "max_abs_difference_torch_cka_to_naive_float64": float((other - expected).abs().max()),
        "cka": [[round(value, 9) for value in row] for row in ours.tolist()],
    }


def naive(model: nn.Module, data: Dataset) -> Tensor:
    """Return the CKA matrix by the three terms of the U-statistic, in float64, pair by pair."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in LAYERS:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
            outputs[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    sums = np.zeros((len(LAYERS), len(LAYERS)))
    for batch in tensors(data):
        with torch.no_grad():
            model(batch)
        grams = []
        for name in LAYERS:
            flat = outputs[name].flatten(1).double().numpy()
            gram = flat @ flat.T
            np.fill_diagonal(gram, 0)
            grams.append(gram)
        sums += np.array([[hsic(K, L) for L in grams] for K in grams])
    for handle in handles:
        handle.remove()
    own = np.diag(sums)
    return torch.from_numpy(sums / np.sqrt(np.outer(own, own)))


def hsic(K: np.ndarray, L: np.ndarray) -> float:
    """Return the U-statistic of two Gram matrices with zero diagonals (Song et al. 2012, equation 5)."""
    n = len(K)
    middle = K.sum() * L.sum() / ((n - 1) * (n - 2))
    last = 2 * (K.sum(0) @ L.sum(0)) / (n - 2)
    return float(((K * L).sum() + middle - last) / (n * (n - 3)))


if __name__ == "__main__":
    sys.exit(main())
