"""A real transformer, MiniLM fine-tuned on SST-2, without layers, neurons and heads: after refit, and after one more epoch.

    python tests/benchmarks/minilm.py --output tests/benchmarks/results/minilm.json --folder minilm_sst2

`--folder` is where `examples/minilm_sst2.py` wrote its weights; the benchmark runs it first where they are missing. Every row runs passes on
the recipe `examples/minilm_sst2.yaml` through the code that `secateurs run` uses. The 872 sentences of SST-2's dev set, which nothing else has
touched, decide. The file is written after each row, and rows that are in it already are kept: delete it to measure everything anew. A plot is
written beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier import LATENCY, Latencies, draw
from measuring import DATA, ROOT, arguments, machine, versions, write
from torch import Tensor, nn

from secateurs import cost
from secateurs.data import Dataset
from secateurs.forward import predict
from secateurs.intervals import mcnemar_p_value, paired_difference_interval
from secateurs.manager import create_manager
from secateurs.outputs import kl_divergence
from secateurs.passes.base import Pass
from secateurs.passes.compared import block_similarity, live_blocks
from secateurs.passes.depth import DepthPass
from secateurs.passes.width import NodePass
from secateurs.pipeline import build_pass, recover, run_passes
from secateurs.plan import DropBlock
from secateurs.recipe import load_recipe, parse_pass
from secateurs.runner import Prepared, prepare
from secateurs.segmentation import anchored_clusters, removed_members

SEEDS = (0, 1, 2)
PARTS = ("depth", "width", "both")
COUNTS = (2, 1)
"""Layers removed of 6; networks without the first count are trained, too."""
LEFT = (0.75, 0.6)
"""Shares of the encoder's parameters that are left."""
DEPTH = ("cka-segment", "cka-cluster", "block-influence", "loss-greedy")
WIDTH: dict[str, dict[str, Any]] = {
    "mi-nodes": {"mi-nodes": {}},
    "magnitude": {"magnitude": {}},
    "magnitude, refitted": {"magnitude": {"refit": "dense"}},
    "taylor, refitted": {"taylor": {"refit": "dense"}},
    "random units, refitted": {"random-nodes": {"refit": "dense"}},
}
"""Node passes by what they are called in tables."""
TRAINED_WIDTH = {"mi-nodes": SEEDS[:1], "magnitude": SEEDS[:1], "magnitude, refitted": SEEDS[:1]}
"""Seeds of training after node passes, for the first of the shares that are left."""
GRID = {"grid": 6, "held_out": 128}
ALLOWED_DROP = 0.01
PROTOCOL = (
    "MiniLM (6 layers, width 384), fine-tuned for 3 epochs on 6,228 sentences of SST-2's train set by examples/minilm_sst2.py; recipe "
    "examples/minilm_sst2.yaml with other passes. Statistics and refit: 512 of these sentences, without labels; divergences for decisions: "
    "up to 512 of the 692 sentences that fine-tuning did not see. Right: of the 872 dev sentences; `kl`: KL(dense || pruned) on them, in "
    "nats. `encoder`: share of the 10.65 M parameters of the encoder's layers that is left; MACs of one sentence of 64 tokens. `trained`: "
    "one more epoch on the other 5.7 k training sentences (AdamW, 5e-5, batches of 32, labels and the dense network's outputs), kept if "
    "validation accuracy is no worse. cka-cluster: the largest threshold at which its clusters give up the number of layers. `drop_ci95` "
    "and p (McNemar, exact, two-sided): dense against pruned on the same sentences. Latency: the exported file beside the dense one, 64 "
    f"tokens, batch 1, one thread of onnxruntime, {LATENCY.processes} fresh processes with both files interleaved; ratio of medians with its "
    "95 % interval. Seconds of one run, by the clock and of the processor (one thread; the machine had other work)."
)


def main() -> int:
    """Run the parts and write; the exit code tells whether a quarter of the encoder goes at no more than one point."""
    given = arguments(__doc__ or "", folder="minilm_sst2", parts=list(PARTS), threads=1)
    torch.set_num_threads(given.threads)
    bench = Bench(prepared(Path(given.folder)))
    rows: list[dict[str, Any]] = []
    if given.output.exists():
        rows = json.loads(given.output.read_text(encoding="utf-8"))["rows"]
    body: dict[str, Any] = {
        "benchmark": "minilm",
        "protocol": PROTOCOL,
        "machine": machine(),
        "versions": versions("torch", "numpy", "transformers", "torch-pruning", "onnxruntime"),
        "threads": given.threads,
        "dense": {
            "right": int(bench.dense_right.sum()),
            "sentences": len(bench.dense_right),
            "encoder_parameters": bench.encoder,
        },
        "summary": {},
        "rows": rows,
    }
    bench.trained = {key_of(row): row["trained"] for row in rows if row["trained"]}
    for job in bench.jobs():
        if job.part in given.parts and not any(row["name"] == job.name for row in rows):
            rows.append(bench.row(job))
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
        body["summary"] = summary(rows)
        write(given.output, body)
    plot(body, given.output.with_suffix(".png"))
    return 0 if body["summary"]["holds"] else 1


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to come: part, what it is called in tables, size, pass, seeds of training after it, a second pass, the run's seed."""

    part: str
    method: str
    size: str
    step: Callable[[], Pass]
    seeds: Sequence[int] = ()
    then: Callable[[], Pass] | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What no other row is called."""
        return f"{self.part}: {self.method}, {self.size}"


def prepared(folder: Path) -> Prepared:
    """Return the recipe with all roles; fine-tune first where there are no weights."""
    weights = folder / "weights.safetensors"
    if not weights.exists():
        import minilm_sst2

        minilm_sst2.prepare(weights, minilm_sst2.read(DATA / "sst2_train.tsv"))
    return prepare(
        load_recipe(ROOT / "examples" / "minilm_sst2.yaml", [f"folder={folder}", f"data_dir={DATA}"]), create_manager()
    )


class Bench:
    """The dense network with its figures, and rows of pruned ones.

    Args:
        prepared: the recipe.
    """

    def __init__(self, prepared: Prepared) -> None:
        assert prepared.evaluation is not None
        self.prepared, self.session = prepared, prepared.session
        # The same sentences, predicted without the padding that the network ignores.
        self.data = dataclasses.replace(prepared.evaluation, trims=self.session.roles.calibration.trims)
        self.one = prepared.evaluation.take([0])
        self.reference = predict(self.session.baseline, self.data)
        self.dense_right = correct(self.reference, self.data)
        self.encoder = encoder_parameters(self.session.baseline)
        self.parameters = cost.total(cost.parameters(self.session.baseline))
        self.macs = cost.total(cost.macs(self.session.baseline, self.one))
        self.latencies = Latencies(self.session.baseline, prepared.evaluation.take(range(8)))
        self.steps: dict[str, Pass] = {}
        self.trained: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def jobs(self) -> Iterator[Job]:
        """Yield every row to measure."""
        for count in COUNTS:
            size, seeds = f"{count} of 6 layers gone", SEEDS[:1] if count == COUNTS[0] else ()
            for method in DEPTH:
                yield Job("depth", method, size, partial(self.depth_pass, method, count), seeds)
            for seed in SEEDS:
                item = {"random-blocks": {"blocks": count, "seed": seed}}
                trained = seeds if seed == SEEDS[0] else ()
                yield Job("depth", "random-blocks", f"{size}, seed {seed}", partial(self.built, item), trained)
        for left in LEFT:
            for method in WIDTH:
                trained = TRAINED_WIDTH.get(method, ()) if left == LEFT[0] else ()
                size, step = f"{left:g} of the encoder", partial(self.width_pass, method, left)
                if "random-nodes" not in WIDTH[method]:
                    yield Job("width", method, size, step, trained)
                    continue
                for seed in SEEDS:
                    yield Job("width", method, f"{size}, seed {seed}", step, seed=seed)
        first = partial(self.depth_pass, "cka-segment", 1)
        size = f"1 layer gone, {LEFT[1]:g} of the encoder"
        then = partial(self.width_pass, "mi-nodes", LEFT[1])
        yield Job("both", "cka-segment, mi-nodes", size, first, SEEDS[:1], then)

    def built(self, item: Mapping[str, Any]) -> Pass:
        """Return a pass as in a recipe; one without a target is kept, so that those of its targets share what it measured."""
        key = str(item)
        if key not in self.steps:
            self.steps[key] = build_pass(parse_pass(dict(item)), self.prepared.manager)
        return self.steps[key]

    def depth_pass(self, method: str, count: int) -> Pass:
        """Return the pass that removes `count` layers."""
        if method != "cka-cluster":
            step = self.built({method: {}})
            assert isinstance(step, DepthPass)
            return step.aimed(count)
        context = self.session.context(self.session.baseline)
        cka = block_similarity(context, live_blocks(context)).cka.numpy()
        for threshold in sorted({float(value) for value in cka[np.triu_indices(len(cka), 1)].clip(0, 1)}, reverse=True):
            if len(removed_members(anchored_clusters(cka, threshold), 1)) >= count:
                break
        return self.built({method: {"threshold": threshold, "max_blocks": count, "tolerance": 1.0, "max_rounds": 1}})

    def width_pass(self, method: str, left: float) -> Pass:
        """Return the pass that leaves a share of the encoder.

        Its target is one for the whole network, embeddings included; what it takes from the pooler behind the encoder comes on top.
        """
        [(name, options)] = WIDTH[method].items()
        step = self.built({name: {**GRID, **options}})
        assert isinstance(step, NodePass)
        baseline: Any = self.session.baseline
        pooler = sum(parameter.numel() for parameter in baseline.bert.pooler.parameters())
        return step.aimed("parameters", 1 - ((1 - left) * self.encoder + pooler) / self.parameters)

    def row(self, job: Job) -> dict[str, Any]:
        """Return the figures of one list of passes, refitted, and trained once with each seed."""
        passes = [make() for make in (job.step, job.then) if make is not None]
        began, worked = time.perf_counter(), time.process_time()
        outcome = run_passes(dataclasses.replace(self.session, seed=job.seed), passes, self.prepared.manager)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
        certificates = [record.certificate for record in outcome.records]
        row: dict[str, Any] = {
            "name": job.name,
            "part": job.part,
            "method": job.method,
            "passes": [{"pass": record.name, **record.settings} for record in outcome.records],
            "layers_dropped": sorted(edit.path for edit in outcome.plan.of(DropBlock)),
            "widths": widths(outcome.model),
            "encoder": encoder_parameters(outcome.model) / self.encoder,
            "macs": cost.total(cost.macs(outcome.model, self.one)) / self.macs,
            "latency": self.latencies(outcome.model),
            "refitted": self.figures(outcome.model),
            "trained": [],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "certificates": [None if found is None else found.model_dump(mode="json") for found in certificates],
            "rounds": [record.details.get("rounds") for record in outcome.records],
            "skipped": [[item.model_dump(mode="json") for item in record.skipped] for record in outcome.records],
            "shortfalls": list(outcome.shortfalls),
        }
        key = key_of(row)
        if job.seeds and key not in self.trained:
            self.trained[key] = [self.train(outcome.model, seed) for seed in job.seeds]
        return {**row, "trained": self.trained[key] if job.seeds else []}

    def train(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Return the figures of a copy after one epoch."""
        network, worked = copy.deepcopy(model), time.process_time()
        session = dataclasses.replace(self.session, seed=seed)
        recover(session, network, self.prepared.recipe.recovery)
        return {"seed": seed, **self.figures(network), "cpu_seconds": round(time.process_time() - worked, 1)}

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Return how a network does on the dev sentences, beside the dense one."""
        outputs = predict(model, self.data)
        right = correct(outputs, self.data)
        lost, gained = int((self.dense_right & ~right).sum()), int((right & ~self.dense_right).sum())
        return {
            "right": int(right.sum()),
            "drop": (lost - gained) / len(right),
            "drop_ci95": paired_difference_interval(lost, gained, len(right)),
            "lost": lost,
            "gained": gained,
            "p_mcnemar": mcnemar_p_value(lost, gained),
            "kl": kl_divergence(self.reference, outputs),
            "wrong": np.flatnonzero(~right).tolist(),
        }


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what rows of the same refitted network have in common: the layers that are gone, whoever chose them."""
    return (row["part"], *row["layers_dropped"]) if row["part"] == "depth" else (row["name"],)


def correct(outputs: Tensor, data: Dataset) -> np.ndarray:
    """Return which sentences are classified right."""
    assert data.labels is not None
    return np.asarray(outputs.argmax(1).numpy() == data.labels)


def encoder_parameters(model: Any) -> int:
    """Return the number of parameters of the encoder's layers, without embeddings, pooler and head."""
    return sum(parameter.numel() for parameter in model.bert.encoder.parameters())


def widths(model: Any) -> list[list[int] | None]:
    """Return neurons and heads of each layer; None for one that is gone."""
    head = model.config.hidden_size // 12
    return [
        [layer.intermediate.dense.out_features, layer.attention.self.query.out_features // head]
        if hasattr(layer, "intermediate")
        else None
        for layer in model.bert.encoder.layer
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether a quarter of the encoder's parameters goes at one point at the most, and by how much each criterion does with 4 layers."""
    enough = [
        {"method": row["method"], "encoder": row["encoder"], "when": when, "drop": drop}
        for row in rows
        for when, drop in (("refitted", row["refitted"]["drop"]), ("trained", mean_drop(row)))
        if row["encoder"] <= 0.75 and drop is not None and drop <= ALLOWED_DROP
    ]
    four = {
        row["method"] + (f", seed {row['passes'][0]['seed']}" if row["method"] == "random-blocks" else ""): {
            "dropped": row["layers_dropped"],
            "refitted": row["refitted"]["right"],
            "trained": [result["right"] for result in row["trained"]],
        }
        for row in rows
        if row["part"] == "depth" and len(row["layers_dropped"]) == 2
    }
    return {"holds": bool(enough), "quarter_gone_within_a_point": enough, "four_layers": four}


def mean_drop(row: Mapping[str, Any]) -> float | None:
    """Return the mean drop over the seeds of training, or None where there was none."""
    return float(np.mean([result["drop"] for result in row["trained"]])) if row["trained"] else None


def line(row: Mapping[str, Any]) -> str:
    """Return a row for the terminal."""
    trained = " ".join(str(result["right"]) for result in row["trained"])
    dropped = ",".join(path.rpartition(".")[2] for path in row["layers_dropped"])
    return (
        f"{row['method']:<24}{dropped:<6}encoder {row['encoder']:.3f}  MACs {row['macs']:.3f}  latency "
        f"{row['latency']['ratio']['value']:.3f}  right {row['refitted']['right']}  KL {row['refitted']['kl']:.3f}  "
        f"trained {trained or '-'}  {row['cpu_seconds']:.0f} s"
    )


def plot(body: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against parameters, MACs and latency."""
    total = body["dense"]["sentences"]
    dense = {
        "encoder": 1.0,
        "macs": 1.0,
        "latency": {"ratio": {"value": 1.0}},
        "accuracy": body["dense"]["right"] / total,
    }
    lines: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys(row["method"] for row in body["rows"]):
        of_method = [row for row in body["rows"] if row["method"] == method]
        for name, key in ((method, "refitted"), (f"{method}*", "trained")):
            points = [
                {**row, "accuracy": float(np.mean([result["right"] for result in results])) / total}
                for row in of_method
                if (results := [row["refitted"]] if key == "refitted" else row["trained"])
            ]
            if points:
                lines[name] = [dense, *averaged(points)]
    draw(
        path,
        f"MiniLM on SST-2 ({total} dev sentences): after refit, and (dashed) after one epoch",
        lines,
        {
            "encoder's parameters left": lambda point: point["encoder"],
            "MACs left": lambda point: point["macs"],
            "onnxruntime latency, pruned / dense": lambda point: point["latency"]["ratio"]["value"],
        },
        ("accuracy", lambda point: point["accuracy"]),
    )


def averaged(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one point for those of one size (seeds), with their mean accuracy."""
    sizes = {round(point["encoder"], 3): point for point in points}
    return [
        {
            **point,
            "accuracy": float(np.mean([other["accuracy"] for other in points if round(other["encoder"], 3) == size])),
        }
        for size, point in sizes.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
