"""Whether a network runs in training mode. What prunes sees evaluation mode alone, and so not the layers that only training uses."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import ModelError, PlanError, SecateursError, first_line
from secateurs.faults import told
from secateurs.forward import call, device_of
from secateurs.plan import DropBlock, Edit, Plan, RemoveUnits, SetAttribute
from secateurs.surgery import applied

__all__ = ["Fault", "check_trained_network", "check_training_mode", "training_fault", "training_notes"]


@dataclass(frozen=True)
class Fault:
    """Where a network stopped in training mode.

    Attributes:
        layer: the innermost module that raised; empty for the network itself.
        said: what it raised.
        finished: how many modules had finished before.
    """

    layer: str
    said: str
    finished: int

    def __str__(self) -> str:
        where = f"layer {self.layer!r}" if self.layer else "its `forward`"
        return f"{where} raises: {self.said.rstrip('.')}"


def training_fault(model: nn.Module, data: Dataset) -> Fault | None:
    """Run a copy of a network on two examples in training mode, and return where it stopped; None if it ran.

    The network, BatchNorm statistics included, and the states of random generators are left as they are.
    """
    twin = copy.deepcopy(model).train()
    running: list[str] = []
    finished = 0

    def leave(*_: Any) -> None:
        nonlocal finished
        running.pop()
        finished += 1

    with ExitStack() as stack:
        for name, module in twin.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_randomness(twin))
        try:
            call(twin, data.take([0, min(1, len(data) - 1)]))
        except Exception as error:  # whatever a user's network raises
            if told(error) is not None:
                raise
            return Fault(running[-1] if running else "", first_line(error), finished)
    return None


@contextmanager
def _same_randomness(model: nn.Module) -> Iterator[None]:
    """Put the random generators of torch and Python back after a block."""
    pythons, device = random.getstate(), device_of(model)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(pythons)


def check_training_mode(model: nn.Module, data: Dataset) -> None:
    """Check that a network can be trained, before anything is pruned.

    Raises:
        ModelError: it does not run in training mode.
    """
    fault = training_fault(model, data)
    if fault is not None:
        raise ModelError(
            f"the network does not run in training mode, which training needs: {fault}. Let `forward` take the training data in both modes, "
            "or leave out `recovery` and `recovery_epochs`."
        )


def check_trained_network(pruned: nn.Module, model: nn.Module, plan: Plan, data: Dataset) -> None:
    """Check that a pruned network can be trained, as the one before it can.

    Args:
        pruned: the network.
        model: before `plan`.
        plan: the edits.
        data: realistic inputs.

    Raises:
        SecateursError: it does not run in training mode; the message names what has to stay.
    """
    fault = training_fault(pruned, data)
    if fault is not None:
        check_training_mode(model, data)
        raise SecateursError(
            f"the pruned network does not run in training mode, which training needs: {fault}. {_advice(model, plan, data)}"
        )


def training_notes(pruned: nn.Module, model: nn.Module, plan: Plan, data: Dataset) -> list[str]:
    """Return a note for the report if a network runs in training mode before pruning and not after it; arguments as above."""
    if not plan.removes:
        return []
    fault = training_fault(pruned, data)
    if fault is None or training_fault(model, data) is not None:
        return []
    return [
        f"the pruned network runs in evaluation mode alone: in training mode, {fault}. {_advice(model, plan, data)}"
    ]


def _advice(model: nn.Module, plan: Plan, data: Dataset) -> str:
    """Return what to do next about a plan that breaks training mode."""
    found = _spoilers(model, plan, data)
    names = ", ".join(repr(name) for name in found) or "the layers in front of it"
    return (
        "What was removed is used there by layers that evaluation mode never runs, such as an auxiliary head. "
        f"To train the pruned network, keep it: `ignored_layers: [{names}]`."
    )


def _spoilers(model: nn.Module, plan: Plan, data: Dataset) -> list[str]:
    """Return the layers whose edits have to be undone for training mode to run, found one by one; none if that does not help."""
    found: list[str] = []
    fault = training_fault(applied(model, plan), data)
    while fault is not None:
        for name in dict.fromkeys(name for name, _ in _named(plan) if name):
            rest = Plan(edits=tuple(edit for other, edit in _named(plan) if other != name))
            try:
                after = training_fault(applied(model, rest), data)
            except PlanError:  # a later edit builds on this one
                continue
            if after is None or after.finished > fault.finished:
                break
        else:
            return []
        found.append(name)
        plan, fault = rest, after
    return found


def _named(plan: Plan) -> Iterator[tuple[str, Edit]]:
    """Yield every edit with the layer that `ignored_layers` knows it by; attributes belong to the edit before them, and forms to none."""
    name = ""
    for edit in plan.edits:
        if isinstance(edit, RemoveUnits):
            name = edit.root
        elif isinstance(edit, DropBlock):
            name = edit.path
        elif not isinstance(edit, SetAttribute):
            name = ""
        yield name, edit
