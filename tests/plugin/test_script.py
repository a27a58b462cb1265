"""`secateurs.prune` with the batches that people have, and what it refuses before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import images, residual, sequences
from torch import nn

import secateurs
from secateurs.data import Roles
from secateurs.errors import DataError, RecipeError
from secateurs.forward import gathered, to_dataset
from secateurs.judging import Validation
from secateurs.manager import create_manager
from secateurs.passes.baselines import Magnitude
from secateurs.passes.block_baselines import RandomBlocks
from secateurs.pipeline import Session, run_passes

HALF = {"magnitude": {"target_units": 0.5}}
PIXELS = torch.from_numpy(images(32).inputs["input"])


def prune(batches=(PIXELS,), passes=(HALF,), **options):
    return secateurs.prune(residual(), PIXELS[:2], batches, passes, **options)


# --- batches -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [torch.arange(32), torch.rand(32), torch.randint(0, 3, (32, 8, 8)), torch.rand(32, 4), np.arange(32)],
    ids=["classes", "numbers", "maps", "vectors", "numpy"],
)
def test_the_second_of_a_pair_is_the_labels_where_the_network_has_one_input(labels):
    data = gathered([(PIXELS[:20], labels[:20]), [PIXELS[20:], labels[20:]]], "calibration", to_dataset(PIXELS[:2]))
    assert list(data.inputs) == ["input"]
    assert np.array_equal(data.inputs["input"], PIXELS.numpy())
    assert np.array_equal(data.labels, np.asarray(labels))
    assert prune([(PIXELS, labels)]).plan == prune().plan


def test_a_pair_is_two_inputs_where_the_network_has_two():
    a, b = torch.rand(6, 3), torch.arange(6)
    data = gathered([(a, b)], "calibration", to_dataset([a.double(), b.double()]))
    assert data.labels is None
    assert [np.array_equal(x, y) for x, y in zip(data.inputs.values(), (a, b), strict=True)] == [True, True]
    paired = gathered([((a, b), b)], "calibration", to_dataset([a.double(), b.double()]))
    assert np.array_equal(paired.labels, b)
    named = gathered(
        [({"x": a, "y": b}, b), {"y": b, "x": a, "labels": b}], "calibration", to_dataset({"y": b, "x": a})
    )
    assert list(named.inputs) == ["y", "x"]
    assert np.array_equal(named.inputs["x"], torch.cat([a, a]))
    assert len(named.labels) == 12


WRONG = {
    "other names": ([{"pixels": PIXELS}], "inputs \\['pixels'\\], and the network takes 1, without names"),
    "other shapes": ([PIXELS, PIXELS[..., :5]], "shapes .* in 'input'; pad or crop"),
    "too many": ([(PIXELS, PIXELS, PIXELS)], "inputs \\['input_0', 'input_1', 'input_2'\\]"),
    "no container": ([PIXELS, 3], "a batch is a int; batches are tensors"),
    "no tensors": ([["a", "b", "c"]], "is a str; batches are tensors"),
    "bfloat16": ([PIXELS.bfloat16()], "give float32"),
    "none": ([], "`calibration` has no batches"),
}


@pytest.mark.parametrize(("batches", "match"), WRONG.values(), ids=WRONG)
def test_batches_that_the_network_does_not_take_are_refused_in_words(batches, match):
    with pytest.raises(DataError, match=match):
        prune(batches)


# --- what is refused before anything is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recovery": {"epochs": 1}}, "there is no `training`; give labelled batches"),
        ({"recovery": {"epochs": 1, "patience": 1}, "training": [(PIXELS, torch.zeros(32))]}, "needs a metric"),
    ],
)
def test_what_training_needs_is_asked_for_first(options, match):
    seen = []
    with pytest.raises((DataError, RecipeError), match=match):
        prune(progress=seen.append, **options)
    assert seen == []


@pytest.mark.parametrize("step", [Magnitude(target_units=0.5), RandomBlocks(blocks=1)], ids=lambda step: step.name)
def test_a_pass_that_has_run_says_so_instead_of_doing_nothing(step):
    assert prune(passes=[step]).plan.removes
    with pytest.raises(RecipeError, match=f"this pass '{step.name}' has been run before"):
        prune(passes=[step])


# --- modes ---------------------------------------------------------------------------------------------------------------------------------


def test_every_module_comes_back_in_its_own_mode():
    model = residual().train()
    model.layers[0].bn1.eval()
    result = secateurs.prune(model, PIXELS[:2], [PIXELS], [{"random-blocks": {"blocks": 1}}, HALF])
    modes = {name: module.training for name, module in model.named_modules()}
    found = {name: module.training for name, module in result.model.named_modules()}
    assert found == {name: modes[name] for name in found}
    assert not all(found.values())
    assert found[""]


class Attends(nn.Module):
    """Attention in the form that has to be taken apart before heads go."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_a_new_module_takes_the_mode_of_the_one_around_it():
    model, x = Attends().train(), torch.from_numpy(sequences(16).inputs["input"])
    model.attention.eval()
    result = secateurs.prune(model, x[:2], [x], [HALF])
    modes = {name: module.training for name, module in result.model.named_modules()}
    assert {name: modes[name] for name in ("", "attention", "attention.q_proj", "head")} == {
        "": True,
        "attention": False,
        "attention.q_proj": False,
        "head": True,
    }


# --- the report ----------------------------------------------------------------------------------------------------------------------------


class Loss:
    """A metric of which less is better."""

    name, higher_is_better = "loss", False

    def per_example(self, outputs, labels):
        return None

    def value(self, outputs, labels):
        return float(nn.functional.cross_entropy(torch.as_tensor(outputs), torch.as_tensor(labels).long()))


def test_the_report_has_the_metric_in_its_own_direction():
    model, data = residual(), images(32, labels=True)
    session = Session(
        baseline=model,
        roles=Roles(data, validation=data),
        cost_models=None,
        evaluate=Validation(Loss(), data),
    )
    record = run_passes(session, [Magnitude(target_units=0.5)], create_manager(external=False)).records[0]
    with torch.no_grad():
        expected = Loss().value(model(torch.from_numpy(data.inputs["input"])), data.labels)
    assert record.details["validation_before"] == pytest.approx(expected, rel=1e-6)
    assert record.details["rounds"][0]["validation"] > 0


# --- devices -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_pruned_and_comes_back_there():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    seen = []

    def evaluate(network):
        seen.append(next(network.parameters()).device.type)
        return 1.0

    labels = torch.zeros(32, dtype=torch.long)
    options = {"training": [(PIXELS, labels)], "recovery": {"epochs": 1}, "evaluate": evaluate}
    model = residual().cuda()
    result = secateurs.prune(
        model, PIXELS[:2].cuda(), [PIXELS.cuda()], [{"mi-nodes": {"target_units": 0.5}}], **options
    )
    assert {parameter.device.type for parameter in (*result.model.parameters(), *model.parameters())} == {"cuda"}
    assert set(seen) == {"cuda"}
    assert result.plan == secateurs.prune(residual(), PIXELS[:2], [PIXELS], [{"mi-nodes": {"target_units": 0.5}}]).plan
