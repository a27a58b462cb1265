"""What the choice of units, the refit and the allocation are each worth: ResNet-20 on CIFAR-10 at equal MACs, without training.

    python tests/benchmarks/cifar_allocation.py --output tests/benchmarks/results/cifar_allocation.json

Every row runs the recipe `examples/cifar_resnet.yaml` with another pass, through the code that `secateurs run` uses, so that the counts are the
same. 1,000 lossless test images, which nothing else has touched, decide.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from measuring import DATA, ROOT, arguments, machine, versions, write

from secateurs import cost, runner
from secateurs.forward import kl_divergence, predict
from secateurs.intervals import mcnemar_p_value, paired_difference_interval
from secateurs.manager import create_manager
from secateurs.recipe import load_recipe, parse_pass

METHODS: dict[str, dict[str, Any]] = {
    "mi-nodes": {"mi-nodes": {}},
    "magnitude, uniform": {"magnitude": {"allocation": "uniform", "refit": "none"}},
    "magnitude, uniform, refitted": {"magnitude": {"allocation": "uniform", "refit": "dense"}},
    "magnitude, measured, refitted": {"magnitude": {"allocation": "measured", "refit": "dense"}},
}
"""Passes by what they are called in tables; the first is compared with each of the others."""
AT_LEAST = {0.7: 890, 0.5: 815}
"""Images of 1,000 that `mi-nodes` must get right, by the share of the MACs that is left."""
PROTOCOL = (
    "Recipe examples/cifar_resnet.yaml with one pass: ResNet-20, 1,024 calibration images of cifar10_lossless_train4k, validation cut "
    "from the same file, no training. Counts and KL(dense || pruned), in nats per image, on the 1,000 images of "
    "cifar10_lossless_test1k. `lost` and `gained`: images that only the first and only the second of a pair gets right; p is "
    "McNemar's, exact and two-sided. Seconds of the passes, one run each."
)


def main() -> int:
    """Run every method at every target and write; the exit code tells whether `mi-nodes` gets enough right."""
    given = arguments(__doc__ or "", targets=[0.7, 0.5], threads=torch.get_num_threads())
    torch.set_num_threads(given.threads)
    body: dict[str, Any] = {
        "benchmark": "cifar_allocation",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "torch-pruning"),
        "threads": given.threads,
        "targets": [target_rows(target) for target in given.targets],
    }
    write(given.output, body)
    enough = True
    for part in body["targets"]:
        for row in part["rows"]:
            line = f"{part['target_macs']}  {row['method']:<30}  {row['right']:4d} right  KL {row['kl']:.3f}  MACs {row['macs_ratio']:.4f}"
            sys.stdout.write(line + "\n")
        enough &= part["rows"][0]["right"] >= AT_LEAST.get(part["target_macs"], 0)
    return 0 if enough else 1


def target_rows(target: float) -> dict[str, Any]:
    """Return the rows of one target, each with its comparison with the first."""
    rows: list[dict[str, Any]] = []
    first = np.zeros(0, dtype=bool)
    for method, item in METHODS.items():
        row, right, dense = run(method, {name: {**options, "target_macs": target} for name, options in item.items()})
        if not rows:
            first = right
        row |= {"against_dense": compare(dense, right)}
        row |= {"mi_nodes_against_this": compare(right, first)} if rows else {}
        rows.append(row)
    return {"target_macs": target, "dense_right": int(dense.sum()), "images": len(dense), "rows": rows}


def run(method: str, item: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return the row of one method, and which images its network and the dense one get right."""
    recipe = load_recipe(ROOT / "examples" / "cifar_resnet.yaml", [f"data_dir={DATA}"])
    prepared = runner.prepare(recipe.model_copy(update={"passes": [parse_pass(item)]}), create_manager())
    began = time.perf_counter()
    outcome = runner.dry_run(prepared)
    seconds = time.perf_counter() - began
    dense, data = prepared.session.baseline, prepared.evaluation
    assert data is not None
    assert data.labels is not None
    reference, outputs = predict(dense, data), predict(outcome.model, data)
    right, before = ((values.argmax(1).numpy() == data.labels) for values in (outputs, reference))
    one = prepared.session.roles.calibration.take([0])
    ratios = {
        name: cost.total(count(outcome.model, one)) / cost.total(count(dense, one))
        for name, count in (("macs_ratio", cost.macs), ("params_ratio", cost.parameters))
    }
    record = outcome.records[0]
    certificate = None if record.certificate is None else record.certificate.model_dump(mode="json")
    row = {
        "method": method,
        "pass": item,
        "right": int(right.sum()),
        "kl": kl_divergence(reference, outputs),
        **ratios,
        "seconds": seconds,
        "certificate": certificate,
        "shortfalls": list(outcome.shortfalls),
        "wrong_images": np.flatnonzero(~right).tolist(),
    }
    return row, right, before


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Return the paired comparison of two networks on the same images."""
    lost, gained = int((one & ~other).sum()), int((other & ~one).sum())
    return {
        "lost": lost,
        "gained": gained,
        "p_mcnemar": mcnemar_p_value(lost, gained),
        "drop_ci95": paired_difference_interval(lost, gained, len(one)),
    }


if __name__ == "__main__":
    sys.exit(main())
