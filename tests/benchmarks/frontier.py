"""What benchmarks of several methods at several sizes share: latency of exported files, and plots of quality against cost."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateurs.data import Dataset
from secateurs.settings import TargetSettings
from secateurs_adapters.export import DynamoExporter
from secateurs_adapters.latency import measure_latency

LATENCY = TargetSettings(repeats=12, warmup=4)
"""Five fresh processes, each with both files, interleaved; one thread, one example per run."""
SHAPES = ("o", "s", "^", "D", "v", "P", "X")


class Latencies:
    """Measures exported networks beside the exported dense one; networks of the same shapes are measured once.

    Args:
        dense: the dense network.
        example: inputs, at the length that is exported.
    """

    def __init__(self, dense: nn.Module, example: Dataset) -> None:
        self._example = example
        self._folder = tempfile.TemporaryDirectory()
        self._dense = self._exported(dense, "dense")
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __call__(self, network: nn.Module) -> dict[str, Any]:
        """Return the ratio of latencies, pruned over dense, with its 95 % interval, and both medians in ms."""
        key = tuple((name, *value.shape) for name, value in network.named_parameters())
        if key not in self._known:
            file = self._exported(network, f"pruned{len(self._known)}")
            found = measure_latency(self._dense, file, LATENCY)
            self._known[key] = {
                "ratio": found.ratio.model_dump(mode="json"),
                "dense_ms": found.baseline.latency.p50,
                "pruned_ms": found.candidate.latency.p50,
                "pruned_cv": found.candidate.latency.cv,
            }
        return self._known[key]

    def _exported(self, network: nn.Module, name: str) -> Path:
        path = Path(self._folder.name) / f"{name}.onnx"
        return DynamoExporter()(network, self._example, path, opset=20).path


def draw(
    path: Path,
    title: str,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Callable[[Mapping[str, Any]], float | None]],
    quality: tuple[str, Callable[[Mapping[str, Any]], float]],
    *,
    logarithmic: bool = False,
) -> None:
    """Draw quality against each cost, a line per method; nothing without matplotlib.

    Args:
        path: of the picture.
        title: above it.
        lines: points of each method, from dense to small; a name that ends with `*` is drawn dashed.
        costs: label and value of each panel's horizontal axis; points without a value are left out.
        quality: label and value of the vertical axis.
        logarithmic: scale of the vertical axis.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        sys.stdout.write("no plot: matplotlib is not installed\n")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(costs), figsize=(4.6 * len(costs), 4.4), sharey=True, squeeze=False)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name.rstrip("*") for name in lines))}
    for axis, (label, cost) in zip(axes[0], costs.items(), strict=True):
        for name, points in lines.items():
            plain = name.rstrip("*")
            shape = SHAPES[list(colours).index(plain) % len(SHAPES)]
            known = sorted((x, quality[1](point)) for point in points if (x := cost(point)) is not None)
            axis.plot(
                *zip(*known, strict=True),
                color=colours[plain],
                marker=shape,
                # Larger and hollow, so that methods that agree show through each other.
                markersize=4 + 1.6 * list(colours).index(plain),
                markerfacecolor="none",
                linestyle="--" if name.endswith("*") else "-",
                linewidth=1.2,
                label=f"{plain}, trained" if name.endswith("*") else plain,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale("log")
    axes[0][0].set_ylabel(quality[0])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.04 + 0.045 * -(-len(labels) // 4), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
