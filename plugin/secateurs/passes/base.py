"""What a pass is: named settings, and proposals that the pipeline applies, certifies, mends and judges.

The author of a pass writes `propose`; the pipeline answers each proposal with `answer(accepted)` and asks again until the pass proposes
nothing. A pass never changes a network: it returns a plan.
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import nn

from secateurs.attention import DescribeAttention
from secateurs.blocks import Describe
from secateurs.data import Dataset
from secateurs.errors import DataError, RecipeError, unknown_name
from secateurs.interfaces import CostModel, ProgressEvent, WidthMultiple
from secateurs.plan import Plan
from secateurs.report import Skipped
from secateurs.settings import LayerSettings, PassSettings

__all__ = ["Context", "Pass", "Proposal", "ignoring"]


def _no_cost_model(name: str) -> CostModel:
    raise RecipeError(unknown_name("cost model", name, ()))


def _no_target() -> WidthMultiple:
    return WidthMultiple(1, "there is no target")


def ignoring(path: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern that names the layer or one that it is inside of, or None."""
    parts = path.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


@dataclass(frozen=True)
class Context:
    """What a pass may look at.

    Attributes:
        model: the network as the passes before left it; read only.
        baseline: the network before all passes; targets are ratios to it.
        calibration: examples for statistics.
        training: examples for recovery, or None.
        validation: labelled examples for decisions, or None.
        evaluate: the metric of a network on validation data, higher is better; None without labels.
        cost_models: the registered cost models, by name, bound to the first target where they depend on one.
        width_multiple: the multiple of channels that the first target likes.
        describe_blocks: the hook `secateurs_describe_blocks`.
        describe_attention: the hook `secateurs_describe_attention`.
        progress: called with every step of a long task.
        seed: of everything random.
        entry: the network as this pass found it, which refit compares with; None where it is `model`.
        done: the edits from `entry` to `model`.
    """

    model: nn.Module
    baseline: nn.Module
    calibration: Dataset
    training: Dataset | None = None
    validation: Dataset | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    cost_models: Callable[[str], CostModel] = _no_cost_model
    width_multiple: Callable[[], WidthMultiple] = _no_target
    describe_blocks: Describe | None = None
    describe_attention: DescribeAttention | None = None
    progress: Callable[[ProgressEvent], None] = field(default=lambda _: None)
    seed: int = 0
    entry: nn.Module | None = None
    done: Plan = field(default_factory=Plan)

    def asks_as(self, other: Context | None) -> bool:
        """Tell whether what was measured for another context holds for this one: the same network, data and seed."""
        return (
            other is not None
            and self.model is other.model
            and self.calibration is other.calibration
            and self.training is other.training
            and self.validation is other.validation
            and self.seed == other.seed
        )

    @property
    def example(self) -> Dataset:
        """A few calibration examples, for tracing and shape checks."""
        return self.calibration.take(range(min(4, len(self.calibration))))


@dataclass(frozen=True)
class Proposal:
    """What a pass wants done in one round.

    Attributes:
        plan: the edits; empty ends the pass.
        skipped: what was considered and left alone, with reasons.
        consumers: the layers to refit towards the network before the edits, in order of execution; empty for no refit.
        ridge: of the refit.
        recovery_epochs: epochs of training before the round is judged.
        tolerance: largest drop of the metric on validation data; None accepts every round.
        recalibrate: re-estimate BatchNorm statistics where that lowers the held-out divergence.
        trainable: the modules that this training changes; empty for all. The others keep their parameters and BatchNorm statistics.
        details: for the report: figures behind the proposal.
    """

    plan: Plan
    skipped: tuple[Skipped, ...] = ()
    consumers: tuple[str, ...] = ()
    ridge: float = 1e-3
    recovery_epochs: int = 0
    tolerance: float | None = None
    recalibrate: bool = False
    trainable: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Pass(abc.ABC):
    """A configured model-to-model transformation, as data.

    Subclasses set `name` and `Settings` and write `propose`. One instance serves one run.

    Args:
        settings: an instance of `Settings`, or None for its defaults.
        **options: fields of `Settings`, instead of an instance.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[PassSettings]] = PassSettings

    def __init__(self, settings: PassSettings | None = None, **options: Any) -> None:
        if settings is not None and options:
            raise RecipeError(f"pass {self.name!r}: give `settings` or options, not both (got {sorted(options)}).")
        self.settings: Any = settings if settings is not None else self.Settings(**options)

    def requires(self, context: Context) -> None:
        """Check that the run gives what this pass needs; called once, before the first proposal.

        Raises:
            DataError: something is missing.
            RecipeError: a layer to ignore is not there.
        """
        if len(context.calibration) < 2:
            raise DataError(
                f"pass {self.name!r} needs at least 2 calibration examples, got {len(context.calibration)}."
            )
        if isinstance(self.settings, LayerSettings):
            names = [name for name, _ in context.baseline.named_modules() if name]
            for pattern in self.settings.ignored_layers:
                if not any(fnmatchcase(name, pattern) for name in names):
                    near = " or ".join(repr(name) for name in difflib.get_close_matches(pattern, names, n=2))
                    hint = f"did you mean {near}?" if near else f"there are, for example, {', '.join(names[:4])}."
                    raise RecipeError(f"pass {self.name!r}, `ignored_layers`: no layer is named {pattern!r}; {hint}")

    @abc.abstractmethod
    def propose(self, context: Context) -> Proposal:
        """Return the next round's edits for `context.model`; an empty plan ends the pass."""

    def shortfall(self, context: Context) -> str | None:  # noqa: ARG002 - most passes promise nothing
        """Return why the promise of this pass is not kept by `context.model`, for example a target that was missed; None if it is."""
        return None

    def answer(self, accepted: bool) -> None:  # noqa: B027 - a pass without rounds need not listen
        """Learn whether the last proposal was kept; a rejected one was undone."""
