"""The face for scripts: a network and batches in, the pruned network with its plan and report out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs import checkpoint, cost
from secateurs.budget import parse_budget
from secateurs.data import resolve_roles
from secateurs.entry import check_arguments, copied, outputs_on, plain_network
from secateurs.errors import DataError
from secateurs.files import write_text
from secateurs.forward import device_of, gathered, to_dataset, trimming
from secateurs.interfaces import ProgressEvent, Target, ratio, width_multiple
from secateurs.manager import Manager, create_manager
from secateurs.passes.base import Pass
from secateurs.pipeline import Outcome, Session, build_pass, recover, run_passes
from secateurs.plan import Plan
from secateurs.proof import environment
from secateurs.recipe import parse_pass, settings_from
from secateurs.recovery import check_settings
from secateurs.report import Ratios, Report, Side
from secateurs.search import prepare_search
from secateurs.settings import RecoverySettings, SearchSettings, TargetSettings
from secateurs.training_mode import check_training_mode, training_notes

__all__ = ["PruneResult", "prune", "pruning_report"]


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns.

    Attributes:
        model: the pruned network, each module in the mode that it had in the one given.
        plan: the edits that lead to it.
        report: what each pass did, with certificates, and parameters and MACs of both networks.
    """

    model: nn.Module
    plan: Plan
    report: Report

    def save(self, folder: str | Path) -> None:
        """Write plan.json, model.safetensors and report.json; `secateurs.load` rebuilds the network from them."""
        checkpoint.save(self.model, self.plan, folder)
        write_text(Path(folder) / "report.json", self.report.to_json())


def prune(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any],
    passes: Sequence[Any],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    accuracy_drop: float | None = None,
    search: SearchSettings | Mapping[str, Any] | None = None,
    target: TargetSettings | Mapping[str, Any] | None = None,
    training: Iterable[Any] | None = None,
    recovery: RecoverySettings | Mapping[str, Any] | None = None,
    manager: Manager | None = None,
    seed: int = 0,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> PruneResult:
    """Prune a network in a script; the model given is not changed.

    Statistics, refit and certificates are taken on the CPU. A network that is on another device is copied there, and the pruned one comes
    back to its device, where `evaluate` and `recovery` see it.

    Args:
        model: the trained network; of a compiled one, the network inside is pruned.
        example_inputs: what the network is called with: a tensor, a tuple, or a dict of tensors by name.
        calibration: batches for statistics and refit, as a DataLoader gives them: inputs, or (inputs, labels) pairs, whose labels are not used.
        passes: as in a recipe (`{"mi-nodes": {"target_macs": 0.5}}` or a name), or `Pass` objects.
        evaluate: network to accuracy (higher is better) on validation data; passes that decide by rounds need it.
        accuracy_drop: largest drop of `evaluate`, a fraction, which then has to be given. A pass without a target is given that of the smallest
            network that keeps it, before `recovery`. `evaluate` returns one number, so the point drop decides.
        search: how that network is searched, as in a recipe.
        target: the device that latency and peak memory are asked for, as in a recipe; None is one thread of the CPU, one example at a time.
        training: labelled batches for recovery; needed if `recovery` has epochs.
        recovery: settings of the training at the end; None trains nothing.
        manager: of the plugins; None loads the installed ones.
        seed: of everything random.
        progress: called with every step.

    Returns:
        The pruned network, the plan and the report.

    Raises:
        UserError: an argument does not follow the form; the message says which.
    """
    network = plain_network(model)
    batches = {"calibration": calibration, **({} if training is None else {"training": training})}
    check_arguments(example_inputs, batches, passes)
    manager = manager or create_manager()
    example = to_dataset(example_inputs)
    pools = {name: gathered(given, name, example) for name, given in batches.items()}
    data, learning = pools["calibration"], pools.get("training")
    pools["calibration"] = replace(data, labels=None)
    settings = (
        settings_from(RecoverySettings, recovery, "recovery")
        if isinstance(recovery, Mapping)
        else recovery or RecoverySettings()
    )
    device = target if isinstance(target, TargetSettings) else settings_from(TargetSettings, target or {}, "target")
    how = settings_from(SearchSettings, search, "search") if isinstance(search, Mapping) else search
    budget = parse_budget({} if accuracy_drop is None else {"accuracy_drop": accuracy_drop})
    home = device_of(network)
    baseline = copied(network).cpu().eval()
    outputs_on(baseline, data)
    if settings.epochs:
        if learning is None:
            raise DataError("`recovery` asks for training, and there is no `training`; give labelled batches.")
        check_settings(settings, network, evaluated=evaluate is not None)
        check_training_mode(baseline, learning)
    session = Session(
        baseline=baseline,
        roles=trimming(baseline, resolve_roles(pools, {}, seed, cut=("validation",))),
        cost_models=lambda name: cost.on_target(manager.registries.cost_models[name].load(), device),
        width_multiple=lambda: width_multiple(_target(manager, device), device),
        evaluate=evaluate if evaluate is None or home.type == "cpu" else _at_home(evaluate, home),
        recovery=settings,
        describe_blocks=lambda network: manager.hook.secateurs_describe_blocks(model=network),
        describe_attention=lambda module: manager.hook.secateurs_describe_attention(module=module),
        progress=progress or (lambda _: None),
        seed=seed,
    )
    built = [item if isinstance(item, Pass) else build_pass(parse_pass(item), manager) for item in passes]
    began = time.perf_counter()
    searched = prepare_search(session, built, manager, budget, how)
    found = None if searched is None else searched.run()
    outcome = run_passes(session, built, manager) if found is None else found.outcome
    pruned = copy.deepcopy(outcome.model) if outcome.model is baseline else outcome.model
    pruned, session = pruned.to(home), replace(session, baseline=baseline.to(home), evaluate=evaluate)
    if settings.epochs and outcome.plan.removes:
        recover(session, pruned, settings)
    report = pruning_report(session, outcome, pruned, time.perf_counter() - began)
    report.trials = [] if found is None else found.trials()
    if network is not model:
        report.notes.append("the network given is compiled, and the pruned one is not: compile it again")
    _as_found(pruned, network)
    return PruneResult(pruned, outcome.plan, report)


def _as_found(pruned: nn.Module, model: nn.Module) -> None:
    """Give every module the mode of its namesake in `model`; what is new takes that of the module around it."""
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in pruned.named_modules():  # from the outside in
        mode = modes.setdefault(name, modes.get(name.rpartition(".")[0], model.training))
        module.training = mode


def _target(manager: Manager, settings: TargetSettings) -> Target | None:
    """Return the registered target of a provider, or None without the adapters."""
    targets = manager.registries.targets
    return targets[settings.provider].make() if settings.provider in targets else None


def _at_home(evaluate: Callable[[nn.Module], float], home: torch.device) -> Callable[[nn.Module], float]:
    """Return the metric of a network that is on the CPU, taken where its owner keeps it."""

    def evaluated(model: nn.Module) -> float:
        try:
            return evaluate(model.to(home))
        finally:
            model.cpu()

    return evaluated


def pruning_report(session: Session, outcome: Outcome, pruned: nn.Module, seconds: float) -> Report:
    """Return what passes did, with parameters and MACs of both networks, where nothing was exported.

    Args:
        session: of the run.
        outcome: of its passes.
        pruned: the network that they led to, trained where that was asked for.
        seconds: that it took.
    """
    macs = cost.change(cost.macs, session.baseline, pruned, session.context(session.baseline).example)
    before, after = (
        Side(
            params=cost.total(cost.parameters(network)),
            macs=count,
            weight_bytes=cost.weight_bytes(network),
        )
        for network, count in zip((session.baseline, pruned), macs.counts, strict=True)
    )
    reasons = [
        *outcome.shortfalls,
        *([] if outcome.plan.removes else ["nothing could be pruned; every reason is listed under `passes`"]),
    ]
    return Report(
        verdict="fail" if reasons else "pass",
        reasons=reasons,
        baseline=before,
        candidate=after,
        ratios=Ratios(params=ratio(after.params, before.params), macs=ratio(after.macs, before.macs)),
        passes=list(outcome.records),
        notes=[
            *session.roles.notes,
            *([] if macs.reason is None else [macs.reason]),
            *training_notes(pruned, session.baseline, outcome.plan, session.roles.calibration),
        ],
        environment=environment(session.seed, 1),
        seconds=seconds,
    )
