"""Pruning inside `transformers.Trainer`: before the training, or at a step in the middle of it.

A Trainer holds on to its network, so the network is pruned in place: its modules are replaced, and the optimiser gets the
new parameters in its old groups. The learning rate and its schedule go on; moments of parameters that changed start anew.

    trainer = Trainer(model, args, train_dataset=..., callbacks=[
        PruneCallback([{"mi-nodes": {"target_macs": 0.7}}], batches, at_step=500),
    ])
    trainer.train()

The plan and a report are written into every checkpoint and, with the network in its final form, into
`output_dir/secateurs`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateurs import checkpoint
from secateurs.errors import ModelError, RecipeError
from secateurs.files import write_text
from secateurs.plan import Plan
from secateurs.report import Report
from secateurs.script import PruneResult, prune
from secateurs.surgery import apply_plan
from secateurs_adapters.hf_folder import REFUSAL, write_folder

__all__ = ["PruneCallback", "prepare_resume", "prune_in_place", "prune_trainer"]

SAVED = "secateurs"
"""The folder in `output_dir` with the pruned network."""
REPORT = "report.json"
"""What was pruned and why, in a checkpoint and in that folder."""
UNPRUNED = "unpruned_config.json"
"""The configuration in a checkpoint of a pruned network; `from_pretrained` must not find it."""


def prune_in_place(
    model: nn.Module,
    calibration: Iterable[Mapping[str, Any]],
    passes: Sequence[Any],
    *,
    optimiser: Any = None,
    **options: Any,
) -> PruneResult:
    """Prune a network that others hold on to, with its optimiser; modes and the network's identity stay.

    Args:
        model: changed in place.
        calibration: batches by input name, as the Trainer's collator gives them; labels are not used.
        passes: as in a recipe.
        optimiser: gets the new parameters in its groups; moments of the changed ones start anew. None where there is none yet.
        options: of `secateurs.prune`, for example `evaluate` or `seed`.

    Returns:
        What `secateurs.prune` returns, with the network given.

    Raises:
        UserError: an argument does not follow the form, or nothing is given to calibrate on.
    """
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
    if not batches:
        raise RecipeError("`calibration` has no batches; give at least one, by input name.")
    result = prune(_plain_copy(model), batches[0], batches, passes, **options)
    before = dict(model.named_parameters())
    apply_plan(model, result.plan)
    model.load_state_dict(result.model.state_dict(), strict=True)
    if optimiser is not None:
        _rebind(optimiser, before, model)
    return replace(result, model=model)


def prune_trainer(
    trainer: Trainer, calibration: Iterable[Mapping[str, Any]], passes: Sequence[Any], **options: Any
) -> PruneResult:
    """Prune a Trainer's network before `train()`; arguments and errors as for `prune_in_place`."""
    _check(trainer.args)
    return prune_in_place(_network(trainer), calibration, passes, optimiser=trainer.optimizer, **options)


def prepare_resume(trainer: Trainer, folder: str | Path) -> None:
    """Give a Trainer's network the structure of a checkpoint that `PruneCallback` saved; then `train(resume_from_checkpoint=folder)`.

    A `PruneCallback` that the Trainer has by now goes on from there: it prunes no more, and writes plan and report as before.

    Args:
        trainer: built anew with the original network.
        folder: `output_dir/checkpoint-N`. Its configuration gets its usual name back, as the Trainer asks for it.

    Raises:
        PlanError: there is no plan, or the network is not the one that it was made for.
        UserError: the checkpoint has no report.
    """
    home, model = Path(folder), _network(trainer)
    plan, report = Plan.load(home / checkpoint.PLAN), Report.load(home / REPORT)
    apply_plan(model, plan)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PruneCallback):
            callback.result = PruneResult(model, plan, report)
    if (home / UNPRUNED).is_file():
        (home / UNPRUNED).replace(home / "config.json")


class PruneCallback(TrainerCallback):
    """Prunes the network of a Trainer after a step or an epoch.

    Args:
        passes: as in a recipe.
        calibration: batches by input name; read when the network is pruned.
        at_step: prune after this many optimiser steps.
        at_epoch: prune after this many epochs; give one of the two.
        limits: largest ratios of pruned to dense network, by name: `params`, `macs`.
        options: of `secateurs.prune`.

    Attributes:
        result: what was pruned; None until then.
    """

    def __init__(
        self,
        passes: Sequence[Any],
        calibration: Iterable[Mapping[str, Any]],
        *,
        at_step: int | None = None,
        at_epoch: int | None = None,
        limits: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        if (at_step is None) == (at_epoch is None) or min(at_step or 1, at_epoch or 1) < 1:
            raise RecipeError(f"give `at_step` or `at_epoch`, at least 1; got {at_step} and {at_epoch}.")
        if unknown := set(limits or {}) - {"params", "macs"}:
            raise RecipeError(f"`limits` has {', '.join(sorted(unknown))}; known are params and macs.")
        self.passes, self.calibration = list(passes), calibration
        self.at_step, self.at_epoch, self.limits, self.options = at_step, at_epoch, dict(limits or {}), options
        self.result: PruneResult | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Refuse what cannot be pruned later, as soon as the Trainer is built."""
        _check(args)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Refuse it before hours of training, where the callback was added to a Trainer that was there."""
        _check(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **held: Any) -> None:  # noqa: ARG002
        """Prune after the step."""
        if state.global_step == self.at_step:
            self._prune(state, held)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **held: Any) -> None:  # noqa: ARG002
        """Prune after the epoch."""
        if self.at_epoch is not None and round(state.epoch or 0) == self.at_epoch:
            self._prune(state, held)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Write the plan beside the weights, and hide the configuration that does not fit them."""
        folder = _output(args) / f"checkpoint-{state.global_step}"
        if self.result is None or not state.is_world_process_zero or not folder.is_dir():
            return
        self.result.plan.save(folder / checkpoint.PLAN)
        write_text(folder / REPORT, self.result.report.to_json())
        if (folder / "config.json").is_file():
            (folder / "config.json").replace(folder / UNPRUNED)
            write_text(folder / "config.json", REFUSAL)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Save the trained network with its plan and report, judged by the limits."""
        if self.result is None or not state.is_world_process_zero:
            return
        report = self.result.report
        for name, limit in self.limits.items():
            found = getattr(report.ratios, name)
            if found is None or found > limit:
                report.verdict = "fail"
                report.reasons.append(f"{name} are {found} of the dense network's, above the limit {limit:g}")
        folder = _output(args) / SAVED
        checkpoint.save(self.result.model, self.result.plan, folder)
        plain = _plain_copy(self.result.model).eval()
        report.notes += filter(None, [write_folder(plain, self.result.plan, folder)])
        write_text(folder / REPORT, report.to_json())

    def _prune(self, state: TrainerState, held: Mapping[str, Any]) -> None:
        if self.result is not None:
            return
        model, optimiser = held["model"], getattr(held["optimizer"], "optimizer", held["optimizer"])
        with torch.random.fork_rng():
            self.result = prune_in_place(model, self.calibration, self.passes, optimiser=optimiser, **self.options)
        # A checkpoint from before the pruning does not fit any more.
        state.best_metric = state.best_model_checkpoint = None


def _check(args: Any) -> None:
    """Refuse what wraps or rewrites the network, because the wrapper would keep the old parameters.

    Raises:
        ModelError: with what to leave out.
    """
    wraps = {
        "several processes": args.world_size > 1,
        "several GPUs in one process": args.n_gpu > 1,
        "`fsdp`": bool(args.fsdp),
        "`deepspeed`": bool(args.deepspeed),
        "`torch_compile`": bool(args.torch_compile),
    }
    found = [name for name, used in wraps.items() if used]
    if found:
        raise ModelError(
            f"a Trainer with {', '.join(found)} wraps its network, which cannot be pruned inside. Prune with `secateurs.prune` "
            f"before the Trainer is built, or train in one process."
        )


def _network(trainer: Trainer) -> nn.Module:
    if trainer.model is None:
        raise ModelError("the Trainer has no network yet (`model_init` builds it in `train()`); give it `model`.")
    return trainer.model


def _output(args: TrainingArguments) -> Path:
    if args.output_dir is None:
        raise RecipeError("the Trainer's `output_dir` is None; give a folder, as the pruned network is saved in it.")
    return Path(args.output_dir)


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy without what accelerate adds to `forward` in mixed precision."""
    from accelerate.utils import extract_model_from_parallel

    plain: nn.Module = extract_model_from_parallel(copy.deepcopy(model), keep_fp32_wrapper=False)
    return plain


def _rebind(optimiser: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Give an optimiser the parameters that now have the names of its old ones; new names go to the last group."""
    names = {id(parameter): name for name, parameter in before.items()}
    after = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for group in optimiser.param_groups:
        held = [names.get(id(parameter)) for parameter in group["params"]]
        if None in held:
            raise ModelError(
                "the optimiser trains parameters that the network does not have; build it from the network."
            )
        group["params"] = [after[name] for name in held if name in after]
    optimiser.param_groups[-1]["params"] += [value for name, value in after.items() if name not in before]
    kept = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    for parameter in [parameter for parameter in optimiser.state if id(parameter) not in kept]:
        del optimiser.state[parameter]
