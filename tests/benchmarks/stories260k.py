"""A real, tiny decoder, stories260K, without neurons, groups of heads or layers: perplexity of held-out stories after refit, without training.

    python tests/benchmarks/stories260k.py --output tests/benchmarks/results/stories260k.json

The network writes its own data: texts drawn at temperature 1, with one seed for statistics and refit and another for the verdict. Every method
runs on three such pairs. A plot is written beside the JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from frontier import LATENCY, Latencies, draw
from measuring import ROOT, arguments, machine, versions, write
from torch import Tensor, nn

from secateurs import cost
from secateurs.data import Dataset
from secateurs.manager import Manager, create_manager
from secateurs.script import prune

sys.path.insert(0, str(ROOT / "tests" / "architectures"))

from stories import load, perplexity, sample

SEEDS = (0, 1, 2)
LENGTH, STATISTICS, HELD_OUT = 128, 320, 128
LEFT = (0.85, 0.7, 0.5)
"""Shares of the parameters outside the embedding that are left."""
WIDTH: dict[str, dict[str, Any]] = {
    "mi-nodes": {"mi-nodes": {}},
    "magnitude": {"magnitude": {}},
    "magnitude, refitted": {"magnitude": {"refit": "dense"}},
    "taylor, refitted": {"taylor": {"refit": "dense"}},
    "random units, refitted": {"random-nodes": {"refit": "dense"}},
}
"""Node passes by what they are called in tables."""
DEPTH = ("cka-segment", "block-influence", "loss-greedy", "random-blocks")
COUNTS = (1, 2)
"""Layers removed of 5."""
PROTOCOL = (
    "stories260K (5 layers, width 64, 8 heads on 4 key-value heads, 172 neurons, tied embedding of 512 tokens). For each seed s: "
    f"{STATISTICS} texts of {LENGTH} tokens drawn from the dense network at temperature 1 with seed 100 + s for statistics and refit (a "
    f"fifth of them for decisions), and {HELD_OUT} with seed 200 + s, which nothing else sees, for perplexity. No training. `left`: share "
    f"of the parameters outside the embedding, `macs`: of the MACs outside the head, for {LENGTH} tokens. The mean of three seeds, and "
    "each. Latency, for the networks of the first seed: the exported file beside the dense one, batch 1, one thread of onnxruntime, "
    f"{LATENCY.processes} fresh processes with both files interleaved. Seconds of the processor for one run, with certificates."
)


def main() -> int:
    """Run every method on every seed and write; the exit code tells whether `mi-nodes` has the lowest mean perplexity at each size."""
    given = arguments(__doc__ or "", threads=1)
    torch.set_num_threads(given.threads)
    manager, dense = create_manager(), load()
    rows = []
    for row in runs(dense, manager):
        rows.append(row)
        sys.stdout.write(
            f"seed {row['seed']}  {row['method']:<24}left {row['left']:.3f}  MACs {row['macs']:.3f}  "
            f"perplexity {row['dense_perplexity']:.3f} -> {row['perplexity']:.3f}  {row['cpu_seconds']:.0f} s\n"
        )
        sys.stdout.flush()
    body: dict[str, Any] = {
        "benchmark": "stories260k",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "transformers", "torch-pruning", "onnxruntime"),
        "threads": given.threads,
        "summary": summary(rows),
        "rows": rows,
    }
    write(given.output, body)
    for line in body["summary"]:
        sys.stdout.write(
            f"{line['method']:<24}{line['asked']:<10}left {line['left']:.3f}  perplexity {line['perplexity']:.3f}\n"
        )
    plot(body["summary"], float(np.mean([row["dense_perplexity"] for row in rows])), given.output.with_suffix(".png"))
    return 0 if holds(body["summary"]) else 1


def runs(dense: nn.Module, manager: Manager) -> Iterator[dict[str, Any]]:
    """Yield the figures of every method, on the texts of every seed."""
    latencies = Latencies(dense, Dataset({"input_ids": sample(dense, LENGTH, 8, 0).numpy()}, keyword=True))
    embedding = sum(parameter.numel() for parameter in dense.get_input_embeddings().parameters())
    whole = cost.total(cost.parameters(dense))
    for seed in SEEDS:
        texts, held_out = sample(dense, LENGTH, STATISTICS, 100 + seed), sample(dense, LENGTH, HELD_OUT, 200 + seed)
        before = perplexity(dense, held_out)
        for method, asked, item in items(lambda left: (embedding + left * (whole - embedding)) / whole):
            worked = time.process_time()
            result = prune(dense, {"input_ids": texts[:2]}, [{"input_ids": texts}], [item], manager=manager, seed=seed)
            seconds = time.process_time() - worked
            [record] = result.report.passes
            assert record.certificate is not None
            yield {
                "seed": seed,
                "method": method,
                "asked": asked,
                "pass": {"pass": record.name, **record.settings},
                "left": (cost.total(cost.parameters(result.model)) - embedding) / (whole - embedding),
                "macs": body_macs(result.model, texts) / body_macs(dense, texts),
                "perplexity": perplexity(result.model, held_out),
                "dense_perplexity": before,
                "latency": latencies(result.model) if seed == SEEDS[0] else None,
                "widths": widths(result.model),
                "certificate": record.certificate.model_dump(mode="json"),
                "rounds": record.details.get("rounds"),
                "shortfalls": result.report.reasons,
                "cpu_seconds": round(seconds, 1),
            }


def items(target: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, size asked for, and pass."""
    for left in LEFT:
        for method, item in WIDTH.items():
            [(name, options)] = item.items()
            yield method, f"{left:g}", {name: {**options, "target_parameters": target(left)}}
    for count in COUNTS:
        for method in DEPTH:
            yield method, f"-{count} layer{'s' * (count > 1)}", {method: {"blocks": count}}


def body_macs(model: nn.Module, texts: Tensor) -> float:
    """Return the multiply-accumulates of one text outside the head."""
    costs = cost.macs(model, Dataset({"input_ids": texts[:1].numpy()}, keyword=True))
    return sum(value for name, value in costs.items() if name != "lm_head")


def widths(model: Any) -> list[list[int] | None]:
    """Return neurons and key-value heads of each layer; None for one that is gone."""
    return [
        [layer.mlp.down_proj.in_features, layer.self_attn.k_proj.out_features // layer.self_attn.head_dim]
        if hasattr(layer, "mlp")
        else None
        for layer in model.model.layers
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over seeds of each method at each size."""
    kinds = dict.fromkeys((row["method"], row["asked"]) for row in rows)
    found = []
    for method, asked in kinds:
        same = [row for row in rows if (row["method"], row["asked"]) == (method, asked)]
        means = {
            name: float(np.mean([row[name] for row in same])) for name in ("left", "macs", "perplexity", "cpu_seconds")
        }
        found.append(
            {
                "method": method,
                "asked": asked,
                **means,
                "perplexities": [row["perplexity"] for row in same],
                "latency": next((row["latency"]["ratio"]["value"] for row in same if row["latency"]), None),
            }
        )
    return found


def holds(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether `mi-nodes` has the lowest perplexity of the node passes at each size."""
    return all(
        min((line for line in lines if line["asked"] == f"{left:g}"), key=lambda line: line["perplexity"])["method"]
        == "mi-nodes"
        for left in LEFT
    )


def plot(lines: Sequence[Mapping[str, Any]], dense: float, path: Any) -> None:
    """Draw perplexity against parameters, MACs and latency."""
    start = {"left": 1.0, "macs": 1.0, "latency": 1.0, "perplexity": dense}
    methods = dict.fromkeys(line["method"] for line in lines)
    draw(
        path,
        "stories260K, refitted without training: perplexity of held-out stories (mean of 3 seeds)",
        {method: [start, *(line for line in lines if line["method"] == method)] for method in methods},
        {
            "parameters left, without the embedding": lambda point: point["left"],
            "MACs left, without the head": lambda point: point["macs"],
            "onnxruntime latency, pruned / dense": lambda point: point["latency"],
        },
        ("perplexity", lambda point: point["perplexity"]),
        logarithmic=True,
    )


if __name__ == "__main__":
    sys.exit(main())
