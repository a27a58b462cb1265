"""Which blocks to remove: ResNet-56 on CIFAR-10 without 3, 6 and 9 of its 27 blocks, without training.

    python tests/benchmarks/depth.py --output tests/benchmarks/results/depth.json

Every row runs a pass on the recipe `examples/cifar_resnet.yaml` with ResNet-56 through the code that `secateurs run` uses, once with BatchNorm
recalibrated alone and once with refit. 1,000 lossless test images, which nothing else has touched, decide. Rows that the output file holds are
not run again. A plot is written beside it where matplotlib is installed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import DATA, ROOT, arguments, machine, versions, write

from secateurs import cost
from secateurs.forward import predict
from secateurs.intervals import mcnemar_p_value, paired_difference_interval
from secateurs.manager import create_manager
from secateurs.outputs import kl_divergence
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.passes.cka_cluster import CkaCluster
from secateurs.passes.compared import block_similarity, live_blocks
from secateurs.passes.depth import DepthPass, layers_after
from secateurs.pipeline import Outcome, build_pass, run_passes
from secateurs.plan import DropBlock, Plan
from secateurs.recipe import load_recipe, parse_pass
from secateurs.runner import Prepared, prepare
from secateurs.segmentation import anchored_clusters, removed_members

PAPER = {"score": "gradnorm", "estimator": "biased", "representation": "sum"}
METHODS: dict[str, dict[str, Any]] = {
    "cka-segment": {"cka-segment": {"refit": "none"}},
    "block-influence": {"block-influence": {"refit": "none"}},
    "cka-cluster": {},
    "loss-greedy": {"loss-greedy": {"refit": "none"}},
    "random": {"random-blocks": {"refit": "none"}},
    "cka-segment, gradnorm": {"cka-segment": {"refit": "none", **PAPER}},
}
"""Passes by what they are called in tables; the first is compared with random blocks and with block influence."""
MENDING = ("recalibrated", "refitted")
PROTOCOL = (
    "Recipe examples/cifar_resnet.yaml with depth 56 and one pass: 1,024 calibration images of cifar10_lossless_train4k, validation cut "
    "from the same file, no training. Recalibrated: BatchNorm statistics, where that lowers the held-out divergence. Refitted: the same "
    "blocks, and the layers behind the first of them refitted before that. Right: of the 1,000 images of cifar10_lossless_test1k. `kl`: "
    "KL(dense || pruned) on them, `kl_validation` on up to 512 validation images, in nats per image. cka-cluster has no budget: of all its "
    "settings (granularity and threshold, or max_blocks with threshold 0) that remove the count in one round, the one of least validation "
    "divergence after recalibration. Seconds of the pass and of mending, one run; passes that differ only in the count share what they "
    "measured, so that the first count pays most."
)


def main() -> int:
    """Run every method and write; the exit code tells whether `cka-segment` beats random blocks and block influence."""
    given = arguments(__doc__ or "", counts=[3, 6, 9], seeds=5, methods=list(METHODS), mending=list(MENDING), threads=1)
    torch.set_num_threads(given.threads)
    recipe = load_recipe(ROOT / "examples" / "cifar_resnet.yaml", [f"data_dir={DATA}", "depth=56"])
    prepared = prepare(recipe, create_manager())
    body: dict[str, Any] = {
        "benchmark": "depth",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy"),
        "threads": given.threads,
        "counts": given.counts,
        "dense_right": int(_right(prepared, prepared.session.baseline)[0].sum()),
        "rows": json.loads(given.output.read_text(encoding="utf-8"))["rows"] if given.output.exists() else [],
    }
    for method in given.methods:
        for row in rows(prepared, method, given, body["rows"]):
            body["rows"].append(row)
            body["summary"] = {mending: summary(body["rows"], mending, given.counts) for mending in MENDING}
            write(given.output, body)
            sys.stdout.write(_line(row) + "\n")
            sys.stdout.flush()
    plot(body, given.output.with_suffix(".png"))
    return 0 if all(body["summary"][mending]["holds"] for mending in given.mending) else 1


def rows(prepared: Prepared, method: str, given: Any, known: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one method that are not known: each choice of blocks, recalibrated and refitted."""
    have = {(row["method"], row["count"], row["seed"], row["mending"]): row for row in known}
    for seed in range(given.seeds) if method == "random" else [None]:
        shared: DepthPass | None = None
        for count in given.counts:
            first = have.get((method, count, seed, "recalibrated"))
            if first is None:
                if method == "cka-cluster":
                    step: Pass = _cluster(prepared, count)
                else:
                    shared = shared or _built(prepared, METHODS[method], seed)
                    step = shared.aimed(count)
                first = run(prepared, {"method": method, "count": count, "seed": seed, "mending": "recalibrated"}, step)
                yield first
            if "refitted" in given.mending and (method, count, seed, "refitted") not in have:
                key = {"method": method, "count": count, "seed": seed, "mending": "refitted"}
                yield run(prepared, key, Refitted(first["blocks"]))


def _built(prepared: Prepared, item: Mapping[str, Any], seed: int | None) -> DepthPass:
    options = {} if seed is None else {"seed": seed}
    step = build_pass(parse_pass({name: {**settings, **options} for name, settings in item.items()}), prepared.manager)
    assert isinstance(step, DepthPass)
    return step


class Refitted(Pass):
    """Bypasses the blocks that another pass has chosen, and refits what runs behind them as every depth pass does with `refit: dense`."""

    name = "refitted"

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self._paths = list(paths)

    def propose(self, context: Context) -> Proposal:
        """Return the blocks, once."""
        plan = Plan(edits=tuple(DropBlock(path=path, reason="chosen before") for path in self._paths))
        self._paths = []
        consumers = layers_after(context.model, context.example, plan)
        return Proposal(plan, consumers=consumers, recalibrate=True)


def _cluster(prepared: Prepared, count: int) -> CkaCluster:
    """Return the `cka-cluster` that removes `count` blocks in one round and diverges least on validation data."""
    context = prepared.session.context(prepared.session.baseline)
    similarity = block_similarity(context, live_blocks(context))
    cka, removable = similarity.cka.numpy(), [block.removable for block in similarity.blocks]
    tried: dict[tuple[int, ...], dict[str, Any]] = {}
    for granularity in (1, 2, 3):
        for threshold in np.unique(np.round(cka[np.triu_indices(len(cka), 1)].clip(0, 1), 6)):
            gone = removed_members(anchored_clusters(cka, float(threshold)), granularity)
            chosen = tuple(index for index in gone if removable[index])
            if len(chosen) == count:
                tried.setdefault(chosen, {"granularity": granularity, "threshold": float(threshold)})
    options: list[dict[str, Any]] = [*tried.values(), {"granularity": 1, "threshold": 0.0, "max_blocks": count}]
    once: dict[str, Any] = {"tolerance": 1.0, "max_rounds": 1, "refit": "none"}
    found = []
    for option in options:
        outcome = run_passes(prepared.session, [CkaCluster(**option, **once)], prepared.manager)
        found.append((_divergence(prepared, outcome.model), option))
    best = min(found, key=lambda pair: pair[0])[1]
    return CkaCluster(**best, **once)


def _divergence(prepared: Prepared, model: torch.nn.Module) -> float:
    data = prepared.session.held_out()
    return kl_divergence(predict(prepared.session.baseline, data), predict(model, data))


def _right(prepared: Prepared, model: torch.nn.Module) -> tuple[np.ndarray, torch.Tensor]:
    data = prepared.evaluation
    assert data is not None
    outputs = predict(model, data)
    return outputs.argmax(1).numpy() == data.labels, outputs


def run(prepared: Prepared, key: Mapping[str, Any], step: Pass) -> dict[str, Any]:
    """Return the row of one pass."""
    dense, one = prepared.session.baseline, prepared.session.roles.calibration.take([0])
    began = time.perf_counter()
    outcome: Outcome = run_passes(prepared.session, [step], prepared.manager)
    seconds = time.perf_counter() - began
    right, outputs = _right(prepared, outcome.model)
    record = outcome.records[0]
    assert record.certificate is not None
    ratios = {
        name: cost.total(count(outcome.model, one)) / cost.total(count(dense, one))
        for name, count in (("macs_ratio", cost.macs), ("params_ratio", cost.parameters))
    }
    return {
        **key,
        "right": int(right.sum()),
        "blocks": sorted(edit.path for edit in outcome.plan.of(DropBlock)),
        "kl": kl_divergence(_right(prepared, dense)[1], outputs),
        "kl_validation": _divergence(prepared, outcome.model),
        **ratios,
        "seconds": round(seconds, 1),
        "settings": step.settings.model_dump(mode="json"),
        "removals": [item["block"] for item in record.details.get("removals", ())],
        "segments": record.details.get("segments"),
        "mended": record.details["rounds"][0],
        "certificate": record.certificate.model_dump(mode="json"),
        "shortfalls": list(outcome.shortfalls),
        "wrong_images": np.flatnonzero(~right).tolist(),
    }


def summary(rows: Sequence[Mapping[str, Any]], mending: str, counts: Sequence[int]) -> dict[str, Any]:
    """Return images right by method and count (random: the mean, and each), and whether the first method beats what it has to."""
    each: dict[str, list[list[int]]] = {}
    done = {row["method"] for row in rows if row["mending"] == mending}
    for method in filter(done.__contains__, METHODS):
        of = [row for row in rows if row["method"] == method and row["mending"] == mending]
        each[method] = [[row["right"] for row in of if row["count"] == count] for count in counts]
    mean = {name: [statistics.mean(right) if right else None for right in values] for name, values in each.items()}
    found: dict[str, Any] = {"right": mean, "random_each": each.get("random", []), "holds": False}
    needed = [each.get(name, []) for name in ("cka-segment", "random", "block-influence")]
    if not all(values and all(values) for values in needed):
        return found
    first, random, influence = ([statistics.mean(right) for right in values] for values in needed)
    beats = [a > b for a, b in zip(first, random, strict=True)]
    of_mending = [row for row in rows if row["mending"] == mending]
    return found | {
        "beats_random_at_each_count": beats,
        "beats_block_influence_in_sum": sum(first) > sum(influence),
        "against_block_influence": [_compared(of_mending, "block-influence", count) for count in counts],
        "holds": all(beats) and sum(first) > sum(influence),
    }


def _compared(rows: Sequence[Mapping[str, Any]], other: str, count: int) -> dict[str, Any]:
    """Return the paired comparison of the first method with another on the same images."""
    wrong = {row["method"]: set(row["wrong_images"]) for row in rows if row["count"] == count}
    lost, gained = len(wrong["cka-segment"] - wrong[other]), len(wrong[other] - wrong["cka-segment"])
    return {
        "count": count,
        "lost": lost,
        "gained": gained,
        "p_mcnemar": mcnemar_p_value(lost, gained),
        "drop_ci95": paired_difference_interval(lost, gained, 1000),
    }


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['method']:<22}{row['count']} blocks {row['mending']:<13}{row['right']:4d} right  KL {row['kl']:.4f}  "
        f"validation {row['kl_validation']:.4f}  {row['seconds']:.0f} s"
    )


def plot(body: Mapping[str, Any], path: Path) -> None:
    """Draw images right over blocks removed, one panel for each way to mend; nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        sys.stdout.write("no plot: matplotlib is not installed\n")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = {mending: part for mending, part in body["summary"].items() if part["right"]}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (mending, found) in zip(axes[0], panels.items(), strict=True):
        for method, right in found["right"].items():
            style: dict[str, Any] = {"color": f"C{[*METHODS].index(method)}", "marker": "o"}
            if method == "random":
                style = {"color": "0.5", "linestyle": "--"}
            values = [float("nan") if value is None else value for value in right]
            axis.plot(body["counts"], values, label="random (mean)" if method == "random" else method, **style)
        for count, values in zip(body["counts"], found["random_each"], strict=False):
            axis.plot([count] * len(values), values, color="0.5", linestyle="", marker="_")
        axis.axhline(body["dense_right"], color="0.8", linewidth=1, zorder=0)
        axis.annotate("dense", (body["counts"][0], body["dense_right"]), color="0.5", fontsize=8, va="bottom")
        axis.set(title=mending, xlabel="blocks removed of 27", xticks=body["counts"])
    axes[0][0].set_ylabel("test images right of 1,000")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("ResNet-56, CIFAR-10, no training")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
