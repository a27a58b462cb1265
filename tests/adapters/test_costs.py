"""Predicted peak memory and latency against what is built, exported and profiled; widths that providers like."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.cost import TargetedCost, on_target
from secateurs.data import Dataset
from secateurs.errors import ExportError, ProviderError
from secateurs.groups import plan_removal
from secateurs.interfaces import StructureCostModel, width_multiple
from secateurs.passes.survey import checked_groups
from secateurs.plan import Plan
from secateurs.settings import NodeSettings, TargetSettings
from secateurs.surgery import applied
from secateurs_adapters.costs import latency, peak_memory
from secateurs_adapters.export import dynamo
from secateurs_adapters.memory import profile_memory
from secateurs_adapters.narrowing import NarrowedExport, exported_model
from secateurs_adapters.validate import OnnxRuntimeTarget

TARGET = TargetSettings(batch_size=3)


class Stages(nn.Module):
    """Two stages around a padded shortcut, a concatenation and a depthwise convolution: everything that a width may be written into."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.after = 8
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.side, self.other = nn.Conv2d(32, 20, 1), nn.Conv2d(32, 12, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.mix = nn.Conv2d(32, 10, 1)
        self.hidden, self.head = nn.Linear(10 * 16, 40), nn.Linear(40, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))
        x = F.relu(self.norm(self.outer(F.relu(self.inner(x)))) + y)
        x = torch.cat([F.relu(self.other(x)), F.relu(self.depthwise(self.side(x)))], 1)
        return self.head(F.relu(self.hidden(F.relu(self.mix(x)).flatten(1))))


def images(n=4):
    return Dataset({"input": np.random.default_rng(0).standard_normal((n, 3, 8, 8)).astype(np.float32)})


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = Stages().eval()
    groups, _ = checked_groups(model, images(), NodeSettings())
    return model, groups, NarrowedExport(model, images(), groups)


def narrowed(model, groups, keep):
    plan = Plan()
    for group in groups:
        units = range(group.units - keep.get(group.root, group.units))
        if units:
            plan += plan_removal(model, group, units, "narrower", plan)
    return applied(model, plan)


def forms(model):
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [(node.op_type, [str(a) for a in node.attribute]) for node in model.graph.node], sizes


WIDTHS = [
    {},
    {"stem": 8, "inner": 16},
    {"stem": 5, "outer": 3, "inner": 7, "side": 11, "other": 9, "mix": 4, "hidden": 13},
]


def test_every_kind_of_group_is_there(case):
    assert {group.root for group in case[1]} == {"stem", "outer", "inner", "side", "other", "mix", "hidden"}
    assert {group.root: len(group.attributes) for group in case[1]}["outer"] == 2


@pytest.mark.parametrize("keep", WIDTHS)
def test_a_narrowed_file_is_what_the_narrowed_network_exports(case, keep):
    model, groups, files = case
    assert forms(files.at(keep)) == forms(exported_model(narrowed(model, groups, keep), images()))


@pytest.mark.parametrize("keep", WIDTHS)
def test_the_predicted_peak_is_what_onnxruntime_profiles_of_the_pruned_network(case, keep, tmp_path):
    model, groups, _ = case
    predicted = peak_memory.structure(model, images(), groups, TARGET)(keep)
    pruned = narrowed(model, groups, keep)
    dynamo(pruned, images(), tmp_path / "m.onnx", opset=20)
    profiled = profile_memory(tmp_path / "m.onnx", TARGET)
    assert profiled <= predicted <= 1.05 * profiled
    assert peak_memory.total(pruned, images(), TARGET) == predicted


def test_latency_is_predicted_by_kernels_that_are_timed_once(case):
    model, groups, _ = case
    cost = latency.structure(model, images(), groups, TARGET)
    full, narrow = cost({}), cost({"stem": 8, "inner": 8, "side": 4, "hidden": 8})
    assert 0 < narrow < full < 50
    assert latency.total(model, images(), TARGET) == pytest.approx(full, rel=1e-12)
    assert cost.additive
    assert not peak_memory.structure(model, images(), groups, TARGET).additive


class Tokens(nn.Module):
    """One hidden layer per token, at any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, ids):
        return self.head(F.relu(self.hidden(self.embed(ids))).mean(1))


def ids(length):
    return Dataset({"ids": np.random.default_rng(0).integers(0, 20, (4, length))})


def tokens():
    """Return a network with the group of its hidden layer."""
    torch.manual_seed(0)
    model = Tokens().eval()
    groups, _ = checked_groups(model, ids(8), NodeSettings())
    return model, [group for group in groups if group.root == "hidden"]


def test_other_examples_of_the_same_network_are_predicted_anew():
    model, groups = tokens()
    peaks = [peak_memory.structure(model, ids(length), groups, TARGET)({}) for length in (8, 64)]
    assert peaks == [peak_memory.total(model, ids(length), TARGET) for length in (8, 64)]
    assert peaks[0] < peaks[1]


def test_the_cost_is_that_of_the_target_s_sequence_length():
    model, groups = tokens()
    at_64 = TARGET.model_copy(update={"sequence_length": 64})
    expected = peak_memory.total(model, ids(64), TARGET)
    assert expected > peak_memory.total(model, ids(8), TARGET)
    assert peak_memory.total(model, ids(8), at_64) == expected
    assert peak_memory.structure(model, ids(8), groups, at_64)({}) == expected


def test_a_network_of_fixed_length_costs_what_it_does_at_its_own():
    class Fixed(Tokens):
        """Reads eight tokens side by side."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8 * 32, 4)

        def forward(self, ids):
            return self.head(F.relu(self.hidden(self.embed(ids))).flatten(1))

    model, longer = Fixed().eval(), TARGET.model_copy(update={"sequence_length": 64})
    assert peak_memory.total(model, ids(8), longer) == peak_memory.total(model, ids(8), TARGET)


def test_other_groups_of_the_same_name_are_predicted_anew():
    model, groups = tokens()
    (single,) = groups
    members = [replace(member, index=member.index.reshape(-1, 2)) for member in single.members]
    pairs = replace(single, units=single.units // 2, members=tuple(members))
    by_one, by_two = (peak_memory.structure(model, ids(64), [group], TARGET) for group in (single, pairs))
    assert by_one({"hidden": 16}) == by_two({"hidden": 8}) < by_two({})


def test_a_network_that_is_gone_leaves_no_export_behind():
    model, groups = tokens()
    cost = peak_memory.structure(model, ids(8), groups, TARGET)
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None
    assert cost({"hidden": 16}) < cost({})


def test_a_network_whose_files_do_not_follow_is_refused():
    class Branching(nn.Module):
        """Another operator below a width."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.first(x)
            return self.second(h.tanh() if self.first.out_features > 7 else h.sigmoid())

    model, data = (
        Branching().eval(),
        Dataset({"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)}),
    )
    groups, _ = checked_groups(model, data, NodeSettings())
    with pytest.raises(ExportError, match="give `target_macs`"):
        NarrowedExport(model, data, groups)


def test_a_provider_that_is_not_here_is_refused(case):
    model, groups, _ = case
    elsewhere = TargetSettings(provider="QNNExecutionProvider")
    for ask in (
        lambda: peak_memory.total(model, images(), elsewhere),
        lambda: latency.structure(model, images(), groups, elsewhere),
    ):
        with pytest.raises(ProviderError, match="not available here"):
            ask()


def test_bound_to_a_target_they_are_cost_models(case):
    model, groups, _ = case
    assert isinstance(peak_memory, StructureCostModel)
    bound = on_target(peak_memory, TARGET)
    assert isinstance(bound, TargetedCost)
    assert bound(model, images()) == {"": peak_memory.total(model, images(), TARGET)}
    assert bound.structure(model, images(), groups)({}) == bound(model, images())[""]


# --- widths -----------------------------------------------------------------------------------------------------------------------------


def test_the_block_of_this_cpu_is_what_its_graphs_show(tmp_path):
    found = OnnxRuntimeTarget().width_multiple(TargetSettings())
    assert found.channels in (1, 4, 8, 16, 32)
    if found.channels == 1:
        pytest.skip("no blocked convolutions here")
    # A convolution of one channel more than a block has two blocks' worth of output.
    from secateurs_adapters.planned import plan_file

    model = nn.Sequential(nn.Conv2d(3, found.channels + 1, 1), nn.Conv2d(found.channels + 1, 3, 1))
    data = Dataset({"x": np.zeros((2, 3, 4, 4), np.float32) + np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1)})
    dynamo(model, data, tmp_path / "m.onnx", opset=20)
    assert plan_file(Path(tmp_path / "m.onnx"), 1).steps[0].output_bytes == 2 * found.channels * 16 * 4


@pytest.mark.parametrize(
    ("provider", "channels"),
    [("CUDAExecutionProvider", 8), ("TensorrtExecutionProvider", 8), ("CoreMLExecutionProvider", 1)],
)
def test_other_providers_go_by_what_is_documented(provider, channels):
    found = OnnxRuntimeTarget().width_multiple(TargetSettings(provider=provider))
    assert found.channels == channels
    assert found.reason


def test_a_target_that_says_nothing_likes_any_width():
    assert width_multiple(None, TargetSettings()).channels == 1


def test_the_exported_model_can_be_saved(case, tmp_path):
    onnx.checker.check_model(case[2].at({"stem": 3}))
    onnx.save(case[2].at({"stem": 3}), str(tmp_path / "m.onnx"))
