"""The contract that every pass keeps, for the tests of passes: yours as well as the built-in ones.

    def test_my_pass():
        PassContract(lambda: MyPass(count=1), model, calibration).check()

Each promise is a method of its own, so that one that a pass cannot keep is left out by name, with a reason. They raise `AssertionError`; no
test runner is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateurs import cost
from secateurs.data import Dataset, Roles
from secateurs.forward import call, inference, output_tensors
from secateurs.manager import Manager, create_manager
from secateurs.passes.base import Pass
from secateurs.pipeline import Outcome, Session, run_passes
from secateurs.plan import Plan
from secateurs.settings import TargetSettings
from secateurs.surgery import applied

__all__ = ["PassContract", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """Everything of a network that looking at it must not change.

    Attributes:
        tensors: copies of all parameters and buffers, by name.
        facts: modes, classes, hooks, `requires_grad` and identities, by what they are.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, object]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take a snapshot."""
        facts: dict[str, object] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            facts[f"the class of {path!r}"] = type(module)
            facts[f"the mode of {path!r}"] = module.training
            facts[f"the hooks of {path!r}"] = sum(
                len(value)
                for name, value in vars(module).items()
                if name.endswith("_hooks") and isinstance(value, dict)
            )
        for path, parameter in model.named_parameters(remove_duplicate=False):
            facts[f"requires_grad of {path!r}"] = parameter.requires_grad
            facts[f"the gradient of {path!r}"] = parameter.grad is not None
            facts[f"the identity of {path!r}"] = id(parameter)
        state = model.state_dict(keep_vars=True)
        return cls({name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}, facts)

    def changes(self, later: Snapshot) -> list[str]:
        """Return what is not the same in a later snapshot."""
        names = {*self.tensors, *later.tensors}
        changed = [
            f"the values of {name!r}" for name in names if not _same(self.tensors.get(name), later.tensors.get(name))
        ]
        keys = {*self.facts, *later.facts}
        return sorted(changed + [key for key in keys if self.facts.get(key) != later.facts.get(key)])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)) and torch.equal(a.isnan(), b.isnan())


class PassContract:
    """A pass, a network and data, and the promises that a pass makes about them.

    Args:
        make: returns a new pass, configured the same each time.
        model: a small network; the pass sees this very object.
        calibration: a few dozen examples.
        example: what outputs and costs are compared on; None takes calibration examples.
        validation: labelled examples for decisions, for passes that need them.
        training: examples for recovery, for passes that need them.
        evaluate: metric of a network on validation data, for passes that decide by rounds.
        manager: of the cost models and blocks that plugins bring; None takes the built-in ones.
        seed: of everything random.
    """

    def __init__(
        self,
        make: Callable[[], Pass],
        model: nn.Module,
        calibration: Dataset,
        *,
        example: Dataset | None = None,
        validation: Dataset | None = None,
        training: Dataset | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        manager: Manager | None = None,
        seed: int = 0,
    ) -> None:
        self.make = make
        self.model = model
        self.example = example or calibration.take(range(min(4, len(calibration))))
        self.roles = Roles(calibration, training, validation)
        self.evaluate = evaluate
        self.manager = manager or create_manager(external=False)
        self.seed = seed

    def check(self) -> Outcome:
        """Check every promise; return what the pass did, for assertions about what this very pass should do."""
        self.check_model_untouched()
        self.check_reasons()
        self.check_certificate()
        self.check_costs()
        self.check_replay()
        self.check_repeatable()
        return self.outcome

    def run(self) -> Outcome:
        """Run a new pass on the network."""
        hook, registries = self.manager.hook, self.manager.registries
        session = Session(
            baseline=self.model,
            roles=self.roles,
            cost_models=lambda name: cost.on_target(registries.cost_models[name].load(), TargetSettings()),
            evaluate=self.evaluate,
            describe_blocks=lambda network: hook.secateurs_describe_blocks(model=network),
            seed=self.seed,
        )
        return run_passes(session, [self.make()], self.manager)

    @cached_property
    def _first(self) -> tuple[Outcome, list[str]]:
        before = Snapshot.of(self.model)
        outcome = self.run()
        return outcome, before.changes(Snapshot.of(self.model))

    @property
    def outcome(self) -> Outcome:
        """What the first run led to."""
        return self._first[0]

    @property
    def _name(self) -> str:
        return f"pass {self.outcome.records[-1].name!r}"

    def check_model_untouched(self) -> None:
        """The network given keeps its weights, modes, hooks and `requires_grad`: a pass returns a plan and changes nothing."""
        changed = self._first[1]
        assert not changed, f"{self._name} changed the network it was given: {', '.join(changed[:5])}. Work on a copy."

    def check_reasons(self) -> None:
        """Every edit and every skipped item says why."""
        for number, edit in enumerate(self.outcome.plan.edits):
            assert edit.reason.strip(), f"{self._name}: edit {number} ({edit.edit}) has no reason. Give `reason=`."
        record = self.outcome.records[-1]
        for item in record.skipped:
            assert item.where.strip(), f"{self._name} skipped something without saying where: {item.reason!r}."
            assert item.reason.strip(), f"{self._name} skipped {item.where!r} without a reason."
        record.model_dump_json()  # figures that JSON cannot hold would break the report

    def check_certificate(self) -> None:
        """The edits that were kept have a certificate that holds."""
        certificate = self.outcome.records[-1].certificate
        if not self.outcome.plan.removes:
            assert certificate is None, f"{self._name} has a certificate for no edits."
            return
        assert certificate is not None, f"{self._name} edited the network, and nothing certifies it."
        assert certificate.holds, (
            f"{self._name}: the pruned network differs from the masked original by {certificate.max_abs:.3g} "
            f"on a scale of {certificate.scale:.3g}."
        )

    def check_costs(self) -> None:
        """Neither MACs nor parameters grow, and edits of structure make at least one of them smaller."""
        ratios = {}
        for name, count in (("MACs", cost.macs), ("parameters", cost.parameters)):
            before, after = (cost.total(count(model, self.example)) for model in (self.model, self.outcome.model))
            assert after <= before, f"{self._name}: {name} grew from {before} to {after}."
            ratios[name] = after / max(before, 1)
        if self.outcome.records[-1].edits:
            assert min(ratios.values()) < 1, f"{self._name} made {len(self.outcome.plan)} edits that save nothing."

    def check_replay(self) -> None:
        """The plan survives JSON, and on a fresh copy it rebuilds the network to identical outputs (difference 0)."""
        plan = Plan.from_json(self.outcome.plan.to_json())
        assert plan == self.outcome.plan, f"{self._name}: the plan is not the same after JSON."
        rebuilt = applied(self.model, plan)
        rebuilt.load_state_dict(self.outcome.model.state_dict(), strict=True)
        for number, (a, b) in enumerate(zip(self._outputs(rebuilt), self._outputs(self.outcome.model), strict=True)):
            difference = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
            assert difference == 0, f"{self._name}: output {number} of the rebuilt network differs by {difference:.3g}."

    def check_repeatable(self) -> None:
        """The same seed gives the same plan."""
        again = self.run()
        assert again.plan == self.outcome.plan, (
            f"{self._name} made another plan with the same seed. Draw from a generator that is seeded with `context.seed`."
        )

    def _outputs(self, model: nn.Module) -> list[Any]:
        with inference(model):
            return output_tensors(call(model, self.example))
