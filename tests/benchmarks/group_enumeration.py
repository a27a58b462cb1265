"""What finding the groups costs: networks of the shapes of ResNet-18 and -50, and of Llama with 2 to 32 layers.

    python tests/benchmarks/group_enumeration.py --output tests/benchmarks/results/group_enumeration.json

The networks are built from configurations with random weights; nothing is downloaded. `find_groups` is the enumeration, `checked_groups` adds
attention heads and compares every group with its readers, observed on the running network (five forward passes per group).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import alternate, machine, medians, versions, write
from torch import nn

from secateurs.attention import describe
from secateurs.data import Dataset
from secateurs.groups import find_groups
from secateurs.passes.survey import checked_groups
from secateurs.settings import NodeSettings

LAYERS = (2, 4, 8, 16, 32)
BUDGETS = {"resnet-50": 5.0, "llama-32": 20.0}
"""Seconds that `find_groups` may take."""
PROTOCOL = (
    "float32, one thread, 2 examples: images of 64 x 64, or 8 tokens. find_groups and checked_groups alternate, after 1 warm-up round; "
    "checked_groups includes find_groups. Exponents: slope of a least-squares line through log(median seconds) over log(layers)."
)


def resnet(depths: list[int], layer_type: str, widths: list[int]) -> tuple[nn.Module, Dataset]:
    """Return a residual network and images for it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=depths, layer_type=layer_type, hidden_sizes=widths)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    return ResNetForImageClassification(config).eval(), Dataset({"pixel_values": pixels}, keyword=True)


def llama(layers: int) -> tuple[nn.Module, Dataset]:
    """Return a decoder with grouped-query attention and tokens for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=128,
        use_cache=False,
    )
    tokens = np.random.default_rng(0).integers(3, 97, (2, 8))
    return LlamaForCausalLM(config).eval(), Dataset({"input_ids": tokens}, keyword=True)


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, Dataset]]] = {
    "resnet-18": functools.partial(resnet, [2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "resnet-50": functools.partial(resnet, [3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    **{f"llama-{layers}": functools.partial(llama, layers) for layers in LAYERS},
}


def main() -> int:
    """Measure and write; the exit code tells whether the budgets hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the results go")
    parser.add_argument("--repeats", type=int, default=3, help="%(default)s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for name, build in NETWORKS.items():
        runs[name] = measure(build, given.repeats)
        middle = runs[name]["medians"]
        sys.stdout.write(f"{name}: find_groups {middle['find_groups']:.2f} s, all {middle['checked_groups']:.2f} s\n")
        sys.stdout.flush()
    exponents = {
        kind: exponent({layers: runs[f"llama-{layers}"]["medians"][kind] for layers in LAYERS})
        for kind in ("find_groups", "checked_groups")
    }
    within = {name: runs[name]["medians"]["find_groups"] <= budget for name, budget in BUDGETS.items()}
    sys.stdout.write(f"growth exponents over layers: {exponents}; within the budgets: {within}\n")
    body = {
        "benchmark": "group_enumeration",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "torch-pruning", "transformers"),
        "budgets_seconds": BUDGETS,
        "within_budget": within,
        "llama_growth_exponents": exponents,
        "runs": runs,
    }
    write(given.output, body)
    return 0 if all(within.values()) else 1


def measure(build: Callable[[], tuple[nn.Module, Dataset]], repeats: int) -> dict[str, Any]:
    """Return the timings of one network, with what was found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, example = build()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    groups, skipped = find_groups(model, example)
    kept, refused = checked_groups(model, example, NodeSettings(), describe)
    samples = alternate(
        {
            "find_groups": lambda: find_groups(model, example),
            "checked_groups": lambda: checked_groups(model, example, NodeSettings(), describe),
        },
        repeats=repeats,
        warmup=0,  # the calls above
    )
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "found": {"groups": len(groups), "skipped": len(skipped)},
        "checked": {"groups": len(kept), "skipped": len(refused)},
        "load_average_before": load,
        "seconds": samples,
        "medians": medians(samples),
    }


def exponent(seconds: Mapping[int, float]) -> float:
    """Return the slope of log(seconds) over log(size).

    >>> round(exponent({2: 4.0, 4: 16.0, 8: 64.0}), 6)
    2.0
    """
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


if __name__ == "__main__":
    sys.exit(main())
