"""The options of every built-in pass and of the other parts of a recipe, free of torch.

Arguments are documented once, here: passes, command line and `secateurs passes --json` read them from these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "BaselineSettings",
    "BlockInfluenceSettings",
    "CkaClusterSettings",
    "CkaSegmentSettings",
    "DepthSettings",
    "EdgeSettings",
    "ExportSettings",
    "LayerSettings",
    "LossGreedySettings",
    "MagnitudeSettings",
    "MiNodesSettings",
    "NodeSettings",
    "PassSettings",
    "QuantiseSettings",
    "RandomBlocksSettings",
    "RecoverySettings",
    "SearchSettings",
    "TargetSettings",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
TargetRatio = Annotated[float, Field(gt=0, le=1)]


class PassSettings(BaseModel):
    """Base of every pass's options: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSettings(PassSettings):
    """What all passes share that remove layers or parts of them."""

    ignored_layers: tuple[str, ...] = Field(
        (),
        description="layers that stay and keep all their outputs, by name or shell pattern (`*.pooler`), with everything inside them",
    )


class CkaClusterSettings(LayerSettings):
    """Options of `cka-cluster` (MPruner)."""

    threshold: Fraction = Field(
        0.98, description="a block joins a cluster while its CKA with the cluster's first block is at least this"
    )
    granularity: int = Field(
        1, ge=1, le=3, description="k: remove members 1, 1+k, 1+2k, ... of each cluster; raised after a rejection"
    )
    max_granularity: int = Field(3, ge=1, description="stop when k would pass this, at least `granularity`")
    tolerance: Fraction = Field(
        0.04, description="largest drop of the metric on validation data for a round to be accepted"
    )
    max_rounds: int = Field(10, ge=1, description="stop after this many accepted rounds")
    max_blocks: int | None = Field(
        None, ge=1, description="remove at most this many blocks, the most similar first; None removes all"
    )
    estimator: Literal["unbiased", "biased"] = Field(
        "unbiased", description="`biased` is paper mode and depends on the batch size"
    )
    batch_size: int = Field(64, ge=4, description="examples per Gram matrix")
    recovery_epochs: int = Field(
        0, ge=0, description="epochs of recovery training before each round is judged (the paper uses 3)"
    )
    freeze: bool = Field(
        False, description="recovery trains only the blocks before and after the removed ones (the paper's Part)"
    )
    refit: Literal["dense", "none"] = Field(
        "dense", description="least-squares update of the layers behind the first removal towards the dense network"
    )

    @model_validator(mode="after")
    def _some_round(self) -> CkaClusterSettings:
        if self.granularity > self.max_granularity:
            raise ValueError(
                f"`granularity` {self.granularity} is above `max_granularity` {self.max_granularity}, so that no round would run; raise the "
                f"latter or lower the former"
            )
        return self


class DepthSettings(LayerSettings):
    """Options that all passes share that bypass blocks until a budget is met; of the three budgets, one is given.

    Targets are ratios candidate / baseline of the whole network.
    """

    blocks: int | None = Field(None, ge=1, description="how many blocks to remove")
    target_macs: TargetRatio | None = Field(None, description="MACs left, candidate / baseline")
    target_parameters: TargetRatio | None = Field(None, description="parameters left, candidate / baseline")
    refit: Literal["dense", "none"] = Field(
        "dense", description="least-squares update of the layers behind the first removal towards the dense network"
    )
    ridge: float = Field(1e-3, gt=0, description="added to covariances, relative to their mean variance")


class CkaSegmentSettings(DepthSettings):
    """Options of `cka-segment` (SGLP)."""

    segments: int | None = Field(
        None, ge=1, description="number of segments, each of which keeps a block; None takes the elbow of the losses"
    )
    representation: Literal["row", "sum"] = Field(
        "row",
        description="what segmentation sees of a block: its row of the CKA matrix, or the row's sum (paper mode)",
    )
    estimator: Literal["unbiased", "biased"] = Field(
        "unbiased", description="`biased` is paper mode and depends on the batch size"
    )
    batch_size: int = Field(64, ge=4, description="examples per Gram matrix (the paper uses 500)")
    score: Literal["bypass", "gradnorm"] = Field(
        "bypass",
        description="measured divergence without the block, anew after each removal; or GradNorm of fresh networks (paper mode)",
    )
    held_out: int = Field(256, ge=16, description="examples on which divergence is measured")
    statistics: int = Field(256, ge=4, description="calibration examples with which a network on trial is mended")
    reach: int = Field(
        0,
        ge=0,
        description="blocks behind the removed one that are refitted on trial (slow); 0 recalibrates BatchNorm instead",
    )
    gradnorm_batches: int = Field(2, ge=1, description="batches of 64 examples over which GradNorm is averaged")
    max_combinations: int = Field(
        64, ge=1, description="ways to choose a segment's blocks up to which GradNorm tries all; beyond it, one by one"
    )


class RandomBlocksSettings(DepthSettings):
    """Options of `random-blocks`."""

    seed: int | None = Field(None, ge=0, description="of the draw; None takes the run's")


class BlockInfluenceSettings(DepthSettings):
    """Options of `block-influence` (ShortGPT)."""


class LossGreedySettings(DepthSettings):
    """Options of `loss-greedy` (SLEB)."""

    samples: int = Field(256, ge=1, description="calibration examples on which the loss is taken")


class NodeSettings(LayerSettings):
    """Options that all node-pruning passes share: how much, where, and how the network is mended.

    Targets are ratios candidate / baseline of the whole network; `target_units` leaves that share of every group's units.
    """

    target_macs: TargetRatio | None = Field(None, description="MACs left, candidate / baseline")
    target_parameters: TargetRatio | None = Field(None, description="parameters left, candidate / baseline")
    target_latency: TargetRatio | None = Field(
        None, description="latency left on the first target, candidate / baseline, as its cost model predicts it"
    )
    target_peak_memory: TargetRatio | None = Field(
        None,
        description="peak memory of a run left on the first target, candidate / baseline, as its cost model plans it",
    )
    target_units: TargetRatio | None = Field(None, description="share of units left in every group")
    allocation: Literal["measured", "uniform"] = Field(
        "measured", description="how removals are spread over groups to meet a target"
    )
    steps: int = Field(
        1,
        ge=1,
        description="reach the target in this many steps: each ranks and measures the units of the network that the one before left, against "
        "the dense network",
    )
    refit: Literal["dense", "none"] = Field(
        "dense", description="least-squares update of the consumers towards the dense network"
    )
    refit_scope: Literal["downstream", "consumers"] = Field(
        "downstream", description="refit every layer behind the first removal, or only the layers that lost inputs"
    )
    coupled: bool = Field(True, description="also prune units that are coupled through additions (residual streams)")
    heads: bool = Field(True, description="also remove attention heads")
    uniform: bool = Field(
        False,
        description="give every group of one kind (same layer name but for its number, same size) the same width, so that a config file "
        "can describe the network",
    )
    min_units: int = Field(1, ge=1, description="units that every group keeps at the least")
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="keep a multiple of this many units in every group; `auto` asks the first target what it likes; None is `auto` for latency "
        "and peak memory, 1 otherwise",
    )
    grid: int = Field(8, ge=2, le=64, description="removal ratios that measured allocation tries per group")
    held_out: int = Field(
        256, ge=16, description="examples on which allocation measures divergence from the dense network"
    )
    compare: bool = Field(
        True,
        description="where a pass has several removal orders: also allocate with each alone, and keep the network that is closest to the "
        "dense one after refit as a whole",
    )
    ridge: float = Field(1e-3, gt=0, description="added to covariances, relative to their mean variance")
    max_group_items: int = Field(
        20_000, ge=1, description="a group with more (layer, dimension) entries than this is skipped"
    )
    time_limit: float = Field(60.0, gt=0, description="seconds after which enumerating a group is given up")


class MiNodesSettings(NodeSettings):
    """Options of `mi-nodes` (MIPP)."""

    estimator: Literal["gaussian", "copula", "mlp"] = Field(
        "gaussian",
        description="closed-form Gaussian mutual information; the same of normal scores, for heavy tails; or trained predictors (paper mode)",
    )
    criteria: tuple[Literal["information", "residual", "magnitude"], ...] = Field(
        ("information", "residual", "magnitude"),
        min_length=1,
        description="removal orders that allocation chooses from, per group; paper mode has its own",
    )
    noise_floor: float = Field(
        1e-2, gt=0, description="noise on the consumer's outputs, relative to their mean variance"
    )
    loss_weighting: Literal["none", "diagonal", "full"] = Field(
        "diagonal",
        description="weight the consumer's outputs by their mean squared loss gradient, or pairs of them by the gradients' second moment",
    )
    sequential: bool = Field(
        False,
        description="rank from the output to the input: outputs that a uniform removal of the later groups drops carry no weight",
    )
    confidence: float | None = Field(
        None,
        ge=0.5,
        lt=1,
        description="keep a unit only if surer than this (one-sided Student interval) that it carries information; sets the widths where no "
        "target is given",
    )
    repeats: int = Field(
        5, ge=2, description="folds of the calibration examples, or trainings of each predictor, behind the confidence"
    )
    least_information: float = Field(
        0.3466,
        ge=0,
        description="nats that a unit must surely carry in closed form; half a bit: its removal adds an error as large as the noise floor",
    )
    max_trainings: int = Field(5000, ge=1, description="paper mode is refused where it would train more predictors")

    @field_validator("loss_weighting", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """Read true and false (YAML's bare `no`) as the diagonal and as nothing."""
        return {True: "diagonal", False: "none"}[value] if isinstance(value, bool) else value


class BaselineSettings(NodeSettings):
    """Options of the node baselines, which do what their papers do unless asked for more: one ratio for all groups, no refit."""

    refit: Literal["dense", "none"] = Field(
        "none", description="least-squares update of the consumers towards the dense network"
    )
    allocation: Literal["measured", "uniform"] = Field(
        "uniform", description="how removals are spread over groups to meet a target"
    )


class MagnitudeSettings(BaselineSettings):
    """Options of `magnitude`: Torch-Pruning's group magnitude importance."""

    p: Literal[1, 2] = Field(2, description="norm")


class RecoverySettings(PassSettings):
    """Training after the passes, on the training role."""

    epochs: int = Field(0, ge=0, description="0 trains nothing")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the cosine schedule (AdamW)")
    batch_size: int = Field(64, ge=1, description="examples per forward pass, over all processes")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    distill: bool = Field(True, description="learn from the dense network's outputs beside the labels")
    temperature: float = Field(2.0, gt=0, description="of the distillation")
    gradient_accumulation: int = Field(
        1,
        ge=1,
        description="batches per step: their mean gradient is that of one large batch, in the memory of a small one",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many epochs without a better metric on validation data; None trains all",
    )
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="mixed precision of the forward passes; needs accelerate (`secateurs[train]`)"
    )
    loop: Literal["auto", "plain", "accelerate"] = Field(
        "auto",
        description="`auto` trains through Hugging Face accelerate where it is installed; `plain` trains every process by itself; one process "
        "in full precision gets the same weights from both",
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        """Read YAML's bare `no`, which is false, as it was meant."""
        return "no" if value is False else value


class SearchSettings(PassSettings):
    """How the smallest network within `budget.accuracy_drop` is searched, where a pass leaves open how much it removes."""

    cost: str = Field("macs", description="what is made small: a registered cost model")
    resolution: float = Field(
        0.02, gt=0, lt=1, description="difference of two costs, candidate / baseline, that is not worth another trial"
    )
    trials: int = Field(24, ge=1, description="networks that are tried at the most")


class EdgeSettings(PassSettings):
    """A second file in which every shape is fixed, for accelerators that take no free ones (NNAPI, CoreML, QNN)."""

    batch_size: int = Field(1, ge=1, description="examples per run")
    sequence_length: int | None = Field(
        None,
        ge=1,
        description="positions of token inputs, where their length is free; None takes the calibration data's",
    )
    ort: bool = Field(
        False,
        description="write it in onnxruntime's own format too, with the list of operators that a reduced build needs",
    )


class ExportSettings(PassSettings):
    """How the network is written."""

    exporter: str = Field("dynamo", description="a registered exporter")
    opset: int = Field(20, ge=9, description="ONNX opset")
    options: dict[str, Any] = Field(default_factory=dict, description="the exporter's own options")
    edge: EdgeSettings | None = Field(None, description="a variant with fixed shapes")


class QuantiseSettings(PassSettings):
    """How the exported file is quantised after pruning; onnxruntime's quantisation unless a plugin brings another mode."""

    mode: str = Field(
        "static",
        description="static (ranges of activations from calibration data), dynamic (at run time), or a plugin's",
    )
    per_channel: bool = Field(True, description="one scale per output channel of a weight")
    activations: Literal["int8", "uint8"] = Field(
        "uint8", description="type of activations, static only: uint8 for CPUs, int8 for GPUs and TensorRT"
    )
    weights: Literal["int8", "uint8"] = Field("int8", description="type of weights")
    reduce_range: bool = Field(False, description="weights in 7 bits, for x86 processors without VNNI")
    calibrate: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="how the ranges of activations are found; static only"
    )
    samples: int = Field(128, ge=1, description="calibration examples that the ranges are taken from; static only")
    operators: list[str] | None = Field(
        None,
        description="operator types to quantise; None takes all (static), or matrix products and embeddings (dynamic)",
    )
    exclude: list[str] = Field(default_factory=list, description="names of nodes to leave as they are")


class TargetSettings(PassSettings):
    """Where and how the files are run and measured."""

    provider: str = Field("CPUExecutionProvider", description="a registered target, named after its execution provider")
    threads: int = Field(1, ge=1, description="intra-op threads")
    batch_size: int = Field(1, ge=1, description="examples per run")
    sequence_length: int | None = Field(
        None, ge=1, description="size of dynamic axes other than the batch in seeded inputs; None takes 16"
    )
    processes: int = Field(5, ge=5, description="fresh processes for latency; each holds both sessions")
    max_processes: int = Field(
        15, ge=5, description="latency takes more processes, up to this, while a verdict is undecided"
    )
    repeats: int = Field(40, ge=4, description="ABBA rounds per process")
    warmup: int = Field(20, ge=1, description="unmeasured runs per session")
    memory_repeats: int = Field(3, ge=1, description="fresh processes per file for memory")
    fits: bool = Field(
        False,
        description="find the smallest memory limit under which each file still runs; `budget.fits_mib` asks for it too",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="provider options, passed to onnxruntime")
    allow_elsewhere: Fraction = Field(
        0.0, description="share of a run's time that may pass on other providers before the verdict fails"
    )

    @field_validator("options")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse what onnxruntime cannot be passed: its options are pairs of text."""
        wrong = [name for name, option in value.items() if not isinstance(option, str | int | float)]
        if wrong:
            raise ValueError(f"provider options are text, numbers or true and false; {', '.join(wrong)} is not")
        return value
