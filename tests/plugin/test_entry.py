"""What is given to `prune` is refused in words before anything is computed, with what to do next."""

import threading

import pytest
import torch
import torch.nn.utils.prune
from networks import images, mlp, plain
from torch import nn

import secateurs
from secateurs.entry import copied, outputs_on, plain_network
from secateurs.errors import DataError, ModelError, RecipeError

DATA = images(32)
PIXELS = torch.from_numpy(DATA.inputs["input"])
HALF = [{"random-nodes": {"target_units": 0.5}}]


def prune(model, example=PIXELS[:2], batches=(PIXELS,), passes=HALF, **options):
    seen = []
    try:
        return secateurs.prune(model, example, batches, passes, progress=seen.append, **options)
    except secateurs.errors.SecateursError:
        assert seen == []
        raise


def with_compiled_part():
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


NO_NETWORKS = {
    "a function": (lambda x: x, r"must be a torch\.nn\.Module, got one of function; put what computes"),
    "a class": (nn.Linear, r"got the class Linear; build one: Linear\(\.\.\.\)"),
    "weights": (mlp().state_dict(), "got one of OrderedDict; build the network, and give it the weights"),
    "none": (None, "got one of NoneType"),
    "lazy": (nn.Sequential(nn.LazyConv2d(4, 3)), r"'0\.weight' has no shape .* call the network once"),
    "meta": (mlp().to("meta"), r"'0\.weight' is on the meta device"),
    "compiled part": (
        with_compiled_part(),
        r"module '0' is compiled; put the module itself in its place: its `_orig_mod`",
    ),
}


@pytest.mark.parametrize(("given", "match"), NO_NETWORKS.values(), ids=NO_NETWORKS)
def test_what_is_no_network_with_values_is_refused(given, match):
    with pytest.raises(ModelError, match=match):
        prune(given)


def test_of_a_compiled_network_the_one_inside_is_pruned():
    model = plain()
    result = prune(torch.compile(model, backend="eager"))
    assert type(result.model) is type(model)
    assert result.plan == prune(model).plan
    assert "compile it again" in result.report.notes[-1]
    assert plain_network(model) is model


class Keeps(nn.Module):
    """Keeps an activation of its last call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        self.last = self.inner(x)
        return self.last


def holding(value):
    model = nn.Sequential(Keeps())
    model[0].held = value
    return model


def called():
    model = nn.Sequential(Keeps())
    model(torch.ones(1, 4))
    return model


def hooked(wrap):
    model = mlp()
    wrap(model[2])
    return model.train()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            called,
            r"attribute '0\.last' is a tensor that was computed with gradients; delete it first, or keep it detached",
        ),
        (
            lambda: holding(threading.Lock()),
            r"attribute '0\.held' is a lock, which cannot be copied .*; delete it first",
        ),
        (
            lambda: hooked(nn.utils.weight_norm),
            r"'2' computes its weight .* torch\.nn\.utils\.remove_weight_norm\(model\.get_submodule\('2'\)\)",
        ),
        (
            lambda: hooked(lambda layer: nn.utils.prune.l1_unstructured(layer, "bias", 0.5)),
            r"torch\.nn\.utils\.prune\.remove\(model\.get_submodule\('2'\), 'bias'\)",
        ),
    ],
    ids=["activation", "lock", "weight_norm", "prune"],
)
def test_what_keeps_a_network_from_being_copied_is_named(make, match):
    with pytest.raises(ModelError, match=match):
        copied(make())


def test_the_advice_on_what_cannot_be_copied_helps():
    model = hooked(nn.utils.spectral_norm)
    model(torch.ones(2, 12))
    with pytest.raises(ModelError, match="remove_spectral_norm"):
        copied(model)
    nn.utils.remove_spectral_norm(model.get_submodule("2"))
    assert torch.equal(copied(model)[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"example": None}, DataError, "`example_inputs` is None; give what the network is called with"),
        ({"batches": None}, DataError, "`calibration` is None; give an iterable of batches"),
        ({"batches": {"input": PIXELS}}, DataError, r"`calibration` is one of dict; .* a list `\[batch\]`"),
        ({"training": 3}, DataError, "`training` is one of int"),
        ({"passes": HALF[0]}, RecipeError, r"`passes` is one of dict; give a list: `\[\{'mi-nodes'"),
        ({"passes": "mi-nodes"}, RecipeError, "`passes` is one of str; give a list"),
        ({"passes": None}, RecipeError, "`passes` is None"),
        (
            {"batches": [PIXELS[:, :2]]},
            DataError,
            r"does not run on the calibration data .*\(2, 8, 8\)}, float32.*channels",
        ),
        ({"batches": [PIXELS.double()]}, DataError, r"does not run on the calibration data .* float64\)"),
    ],
    ids=["example", "calibration", "one batch", "training", "one pass", "a name", "no passes", "shape", "type"],
)
def test_arguments_of_another_form_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        prune(plain(), **options)


def test_a_bfloat16_network_is_told_how_it_can_be_pruned():
    with pytest.raises(DataError, match=r"weights are bfloat16, which data cannot be: give `model\.float\(\)`"):
        prune(plain().bfloat16())
    assert outputs_on(plain().bfloat16().float(), DATA).shape == (2, 5)
