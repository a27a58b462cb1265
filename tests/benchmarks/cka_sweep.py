"""What a CKA sweep costs: all 27 blocks of ResNet-56 on 512 CIFAR-10 images, beside plain forward passes and beside torch_cka.

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
from secateurs.passes.compared import cka_matrix
from secateurs.probe import sweep
from secateurs.similarity import CkaAccumulator
from secateurs_adapters.datasets import NpzSettings, load_npz
from secateurs_adapters.models import load_factory

IMAGES, BATCH = 512, 64
BUDGET = {20: 1.20, 56: 1.10}
"""The sweep may take this many times as long as the plain forward passes, by the network's depth."""
RIVAL = 50
"""torch_cka adds at least this many times as much to the forward passes, at depth 56."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Layouts of the images in memory: PyTorch's usual one, and the one that reading images as NHWC gives, whose convolutions are faster."""
PROTOCOL = (
    "A CIFAR ResNet in evaluation mode without gradients, 512 images in batches of 64 on all sides. Plain forward passes and the sweep "
    "alternate, after 2 warm-up rounds. torch_cka compares a copy of the network with itself, without gradients, on the same batches; "
    "setting it up is not timed. Time in hooks: an extra series with a clock around each tap and each end of a batch. Seconds; ratios "
    "are ratios of medians."
)


def main() -> int:
    """Measure and write; the exit code tells whether the budget holds."""
    given = arguments(__doc__ or "", depth=56, repeats=15, rivals=3, threads=[1], layouts=list(LAYOUTS))
    layers = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range((given.depth - 2) // 6)]
    budget = BUDGET[given.depth]
    normalise = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    file = DATA / "cifar10_lossless_train4k.npz"
    data = load_npz(NpzSettings.model_validate({"file": file, "normalise": normalise})).take(range(IMAGES))
    weights = DATA / f"weights_resnet{given.depth}_cifar10.safetensors"
    model = load_factory("cifar_resnet:build", arguments={"depth": given.depth}, weights=weights, folder=DATA).eval()
    runs = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for layout in given.layouts:
            images = torch.from_numpy(data.inputs["input"]).contiguous(memory_format=LAYOUTS[layout]).numpy()
            load = os.getloadavg()[0]
            figures = measure(model, layers, Dataset({"input": images}), given.repeats, given.rivals)
            within = figures["ratio_sweep_to_forward"] <= budget and figures["ratio_with_hooks_to_forward"] <= budget
            runs.append(
                {
                    "threads": threads,
                    "layout": layout,
                    "load_average_before": round(load, 2),
                    **figures,
                    "within_budget": within,
                }
            )
    body = {
        "benchmark": "cka_sweep",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "torch-cka"),
        "depth": given.depth,
        "layers": layers,
        "budget_ratio": budget,
        "runs": runs,
        "accuracy": accuracy(model, layers, data),
    }
    write(given.output, body)
    for run in runs:
        sys.stdout.write(
            f"{run['threads']} threads, {run['layout']}: {run['ratio_sweep_to_forward']:.3f} x the forward pass in total, "
            f"{run['ratio_with_hooks_to_forward']:.3f} x by the time in hooks; torch_cka's overhead is "
            f"{run['overhead_ratio_torch_cka_to_sweep']:.1f} x ours\n"
        )
    enough = given.depth != 56 or all(run["overhead_ratio_torch_cka_to_sweep"] >= RIVAL for run in runs)
    return 0 if enough and all(run["within_budget"] for run in runs) else 1


def measure(model: nn.Module, layers: list[str], data: Dataset, repeats: int, rivals: int) -> dict[str, Any]:
    """Return all timings with the threads that are set."""
    batches = tensors(data)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    samples = alternate(
        {"forward": forward, "sweep": lambda: cka_matrix(model, layers, data, batch_size=BATCH)}, repeats=repeats
    )
    samples["torch_cka"] = [rival(model, layers, batches)[0] for _ in range(rivals)]
    samples["in_hooks"] = [in_hooks(model, layers, data) for _ in range(5)]
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
        "ratio_with_hooks_to_forward": 1 + middle["in_hooks"] / middle["forward"],
    }


def tensors(data: Dataset) -> list[Tensor]:
    """Return the batches as tensors."""
    return [torch.from_numpy(batch.inputs["input"]) for batch in data.batches(BATCH)]


def rival(model: nn.Module, layers: list[str], batches: list[Tensor]) -> tuple[float, Tensor]:
    """Return the seconds and the values of one comparison by torch_cka, on a copy because its hooks stay."""
    from torch.utils.data import DataLoader, TensorDataset
    from torch_cka import CKA

    loader = DataLoader(TensorDataset(torch.cat(batches)), batch_size=BATCH)
    twin = copy.deepcopy(model)
    comparison = CKA(twin, twin, "first", "second", list(layers), list(layers))
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        comparison.compare(loader, loader)
        seconds = time.perf_counter() - began
    return seconds, comparison.export()["CKA"].double()


def in_hooks(model: nn.Module, layers: list[str], data: Dataset) -> float:
    """Return the seconds that one sweep spends in the taps and at the ends of batches."""
    accumulator, spent = CkaAccumulator(layers), [0.0]

    def clocked(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            began = time.perf_counter()
            function(*args)
            spent[0] += time.perf_counter() - began

        return call

    taps = {name: clocked(accumulator.tap(name)) for name in layers}
    sweep(model, data, taps, batch_size=BATCH, after_batch=clocked(accumulator.end_batch))
    return spent[0]


def accuracy(model: nn.Module, layers: list[str], data: Dataset) -> dict[str, Any]:
    """Return the largest differences of our values from the naive ones and from torch_cka's."""
    ours = cka_matrix(model, layers, data, batch_size=BATCH)
    expected = naive(model, layers, data)
    _, other = rival(model, layers, tensors(data))
    return {
        "max_abs_difference_naive_float64": float((ours - expected).abs().max()),
        "max_abs_difference_torch_cka": float((ours - other).abs().max()),
        "max_abs_difference_torch_cka_to_naive_float64": float((other - expected).abs().max()),
        "cka": [[round(value, 9) for value in row] for row in ours.tolist()],
    }


def naive(model: nn.Module, layers: list[str], data: Dataset) -> Tensor:
    """Return the CKA matrix by the three terms of the U-statistic, in float64, pair by pair."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in layers:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
            outputs[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    sums = np.zeros((len(layers), len(layers)))
    for batch in tensors(data):
        with torch.no_grad():
            model(batch)
        grams = []
        for name in layers:
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
