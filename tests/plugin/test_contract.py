"""Every registered pass on every small network keeps the contract of passes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks import dense, images, mlp, plain, residual, separable, vectors
from torch import nn

from secateurs.errors import DataError, RecipeError
from secateurs.forward import predict
from secateurs.manager import create_manager
from secateurs.passes.base import Pass, Proposal
from secateurs.pipeline import build_pass
from secateurs.plan import DropBlock, Plan, RemoveUnits
from secateurs.recipe import PassSpec
from secateurs.report import Skipped
from secateurs.testing import PassContract, Snapshot

MANAGER = create_manager(external=False)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "residual": (residual, images),
    "plain": (plain, images),
    "separable": (separable, images),
    "dense": (dense, images),
    "mlp": (mlp, vectors),
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cka-cluster": [{"threshold": 0.5, "tolerance": 1.0}, {"threshold": 0.5, "tolerance": 0.0, "estimator": "biased"}],
    "cka-segment": [
        {"blocks": 1, "segments": 1, "held_out": 32, "statistics": 32},
        {"target_macs": 0.9, "segments": 1, "score": "gradnorm", "estimator": "biased", "representation": "sum"},
    ],
    "random-blocks": [{"blocks": 1}],
    "block-influence": [{"target_parameters": 0.9, "refit": "none"}],
    "loss-greedy": [{"target_macs": 0.9, "samples": 32}],
    "mi-nodes": [
        {"target_macs": 0.6, "grid": 3, "steps": 2},
        {"target_units": 0.5, "criteria": ["residual"], "refit": "none"},
    ],
    "magnitude": [
        {"target_parameters": 0.6},
        {"target_macs": 0.6, "grid": 3, "allocation": "measured", "refit": "dense"},
    ],
    "taylor": [{"target_macs": 0.6}, {"target_units": 0.5, "refit": "dense"}],
    "random-nodes": [{"target_macs": 0.6}],
}
"""Options that make each pass do something; a pass that is registered and not listed here fails the tests."""


def no_blocks(network: str) -> str | None:
    """Passes that bypass blocks leave networks without residual paths as they are."""
    return None if network in ("residual", "separable") else "it has no block with a residual path"


DEPTH = ("cka-cluster", "cka-segment", "random-blocks", "block-influence", "loss-greedy")
NOTHING_TO_DO: dict[str, Callable[[str], str | None]] = dict.fromkeys(DEPTH, no_blocks)
"""By pass: why it makes no edit on a network, or None if it has to; the rest of the contract holds all the same."""


def cases():
    for name, options in OPTIONS.items():
        for number, chosen in enumerate(options):
            for network in NETWORKS:
                yield pytest.param(name, chosen, network, id=f"{name}-{number}-{network}")


def contract(make, network, **options):
    build, data = NETWORKS[network]
    model = build()
    next(model.parameters()).requires_grad_(False)
    model.train()
    calibration, validation = data(48), data(32, seed=1)
    labels = predict(model, validation).argmax(1)

    def evaluate(candidate):
        return float((predict(candidate, validation).argmax(1) == labels).double().mean())

    return PassContract(make, model, calibration, validation=validation, evaluate=evaluate, **options)


def test_every_registered_pass_is_listed_here():
    assert {entry.name for entry in MANAGER.registries.passes} == set(OPTIONS)


@pytest.mark.parametrize(("name", "options", "network"), list(cases()))
def test_contract(name, options, network):
    outcome = contract(lambda: build_pass(PassSpec(name=name, options=options), MANAGER), network).check()
    reason = NOTHING_TO_DO.get(name, lambda _: None)(network)
    if options.get("tolerance") != 0.0:
        assert bool(outcome.plan) == (reason is None), reason


# --- the contract itself: a pass that breaks a promise is told which ---------------------------------------------------------------------


@dataclass
class _Scripted:
    """What a pass does in its only round."""

    edits: tuple = ()
    skipped: tuple = ()
    spoil: Callable[[nn.Module], object] = field(default=lambda _: None)


def edits(name, options):
    """Return what a pass removes from the residual network."""
    kept = contract(lambda: build_pass(PassSpec(name=name, options=options), MANAGER), "residual").run().plan.edits
    return [edit for edit in kept if isinstance(edit, RemoveUnits | DropBlock)]


def producers(edit):
    """Return the layers that lose outputs."""
    if isinstance(edit, DropBlock):
        return {*edit.also, edit.path}
    return {part.module for part in edit.slices if part.parameter == "weight" and part.dim == 0}


@pytest.mark.parametrize("name", OPTIONS)
def test_ignored_layers_stay_as_they_are(name):
    options = OPTIONS[name][0]
    layer = sorted(producers(edits(name, options)[0]))[0]
    left = edits(name, {**options, "ignored_layers": [f"{layer[:-1]}?"]})
    inside = {path for path, _ in residual().get_submodule(layer).named_modules(prefix=layer)}
    for edit in left:
        assert not producers(edit) & inside
    inner = next(iter(inside - {layer}), layer)
    for edit in edits(name, {**options, "ignored_layers": [inner]}):
        assert layer not in producers(edit), "what is around an ignored layer stays too"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_to_ignore_that_is_not_there_is_told(name):
    nearly = next(path for path, _ in residual().named_modules() if len(path) > 3)
    with pytest.raises(
        RecipeError, match=f"pass '{name}', `ignored_layers`: no layer is named .*did you mean '{nearly}'"
    ):
        edits(name, {**OPTIONS[name][0], "ignored_layers": [f"{nearly}x"]})


def scripted(script):
    class Scripted(Pass):
        name = "scripted"

        def __init__(self):
            super().__init__()
            self.done = False

        def propose(self, context):
            script.spoil(context.model)
            if self.done:
                return Proposal(Plan())
            self.done = True
            return Proposal(Plan(edits=script.edits), script.skipped)

    return Scripted


DROP = DropBlock(path="layers.1", reason="a test")


def spoil_weight(model):
    with torch.no_grad():
        model.head.bias.add_(1)


BROKEN = {
    "weights": (_Scripted((DROP,), spoil=spoil_weight), "changed the network.*values of 'head.bias'"),
    "mode": (_Scripted((DROP,), spoil=lambda model: model.layers[0].eval()), "changed the network.*mode of 'layers.0'"),
    "hook": (
        _Scripted((DROP,), spoil=lambda model: model.head.register_forward_hook(lambda *_: None)),
        "changed the network.*hooks of 'head'",
    ),
    "gradients": (
        _Scripted((DROP,), spoil=lambda model: model.head.requires_grad_(False)),
        "changed the network.*requires_grad of 'head.bias'",
    ),
    "edit without reason": (_Scripted((DropBlock(path="layers.1"),)), r"edit 0 \(drop_block\) has no reason"),
    "skipped without reason": (
        _Scripted(skipped=(Skipped(where="stem", reason=" "),)),
        "skipped 'stem' without a reason",
    ),
    "skipped nothing": (_Scripted(skipped=(Skipped(where="", reason="why"),)), "without saying where"),
}


@pytest.mark.parametrize(("script", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_promise_is_named(script, message):
    with pytest.raises(AssertionError, match=message):
        contract(scripted(script), "residual").check()


def test_a_pass_that_rolls_dice_is_told():
    blocks = iter(["layers.1", "layers.3"])
    with pytest.raises(AssertionError, match="another plan with the same seed"):
        contract(lambda: scripted(_Scripted((DropBlock(path=next(blocks), reason="dice"),)))(), "residual").check()


def test_a_pass_that_keeps_every_promise_passes_and_its_outcome_comes_back():
    outcome = contract(scripted(_Scripted((DROP,))), "residual").check()
    assert outcome.plan.edits == (DROP,)
    assert outcome.records[-1].certificate.max_abs == 0


def test_what_a_pass_needs_is_an_argument():
    build, data = NETWORKS["residual"]
    make = lambda: build_pass(PassSpec(name="cka-cluster"), MANAGER)  # noqa: E731
    with pytest.raises(DataError, match="validation data"):
        PassContract(make, build(), data(16)).check()


def test_a_snapshot_sees_replaced_modules_and_values():
    model = mlp()
    before = Snapshot.of(model)
    assert before.changes(Snapshot.of(model)) == []
    model[1] = nn.Sigmoid().eval()
    model[0].weight.data[0, 0] = float("nan")
    assert before.changes(Snapshot.of(model)) == ["the class of '1'", "the values of '0.weight'"]
