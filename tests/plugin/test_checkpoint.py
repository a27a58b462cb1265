"""Saving and rebuilding: exact, in a new process, without pickle, and refused where it does not fit."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import NETWORKS, images, mlp, plain, residual, tied

import secateurs
from secateurs import checkpoint
from secateurs.errors import ModelError, PlanError
from secateurs.forward import call, inference
from secateurs.groups import find_groups, plan_removal
from secateurs.plan import AddBias, DropBlock, Plan
from secateurs.surgery import applied

CHILD = """
import pickle, sys
import numpy, torch, networks, secateurs, secateurs.checkpoint

def refuse(*_, **__):
    raise AssertionError("pickle was used")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
torch.set_num_threads(1)
folder, name = sys.argv[1:]
model = secateurs.load(folder, build=lambda: networks.NETWORKS[name][0](seed=99))
assert "torch_pruning" not in sys.modules, "loading replays slices and needs no dependency graph"
with torch.no_grad():
    output = model(torch.from_numpy(numpy.load(folder + "/inputs.npy", allow_pickle=False)))
difference = output.double() - torch.from_numpy(numpy.load(folder + "/outputs.npy", allow_pickle=False)).double()
print(float(difference.abs().max()), model.training)
"""


def pruned_by_half(name, tmp_path):
    """Prune half of every group of a network, disturb the weights as training would, save, and return the network."""
    build, make = NETWORKS[name]
    model, data = build(), make(8)
    plan = Plan()
    for group in find_groups(model, data.take([0, 1]))[0]:
        if "attention" not in group.root and not (name == "zero_padded" and group.root == "stem"):
            plan += plan_removal(model, group, range(0, group.units, 2), "half", plan)
    pruned = applied(model, plan)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (*pruned.parameters(), *(b for b in pruned.buffers() if b.is_floating_point())):
            tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    checkpoint.save(pruned, plan, tmp_path)
    with inference(pruned):
        np.save(tmp_path / "outputs.npy", call(pruned, data).numpy())
    np.save(tmp_path / "inputs.npy", data.inputs["input"])
    return pruned, plan


@pytest.mark.parametrize("name", ["residual", "dense", "encoder", "tied", "zero_padded"])
def test_reload_is_bit_exact_in_a_new_process_without_pickle(name, tmp_path):
    _, plan = pruned_by_half(name, tmp_path)
    assert plan
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), name], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0", "False"]


def test_blocks_biases_and_units_come_back(tmp_path):
    model = residual()
    plan = Plan(edits=(DropBlock(path="layers.1"), AddBias(module="stem")))
    pruned = applied(model, plan)
    torch.nn.init.normal_(pruned.stem.bias)
    checkpoint.save(pruned, plan, tmp_path)
    again = secateurs.load(tmp_path, build=residual)
    state = pruned.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    value = torch.from_numpy(images(4).inputs["input"])
    with torch.no_grad():
        assert torch.equal(again(value), pruned(value))


def test_a_network_may_be_given_in_place_of_a_function_and_is_not_changed(tmp_path):
    pruned_by_half("mlp", tmp_path)
    original = mlp(seed=3)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    loaded = secateurs.load(tmp_path, build=original)
    assert loaded[0].weight.shape == (8, 12)
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_tied_tensors_are_written_once_and_are_tied_again(tmp_path):
    checkpoint.save(tied(), Plan(), tmp_path)
    loaded = secateurs.load(tmp_path, build=lambda: tied(seed=1))
    assert loaded.head.weight is loaded.embedding.weight
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in loaded.parameters()) + 2000


def test_saving_twice_replaces_the_files_and_leaves_no_others(tmp_path):
    for seed in (0, 1):
        checkpoint.save(mlp(seed=seed), Plan(), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "plan.json"]
    assert torch.equal(secateurs.load(folder, build=mlp)[0].weight, mlp(seed=1)[0].weight)


def test_another_structure_is_a_plan_error_or_a_model_error(tmp_path):
    pruned_by_half("residual", tmp_path)
    with pytest.raises(PlanError, match="does not fit the network"):
        secateurs.load(tmp_path, build=plain)
    checkpoint.save(mlp(), Plan(), tmp_path)
    with pytest.raises(ModelError, match="do not fit the network"):
        secateurs.load(tmp_path, build=lambda: mlp(hidden=17))
    with pytest.raises(ModelError, match="do not fit the network"):
        secateurs.load(tmp_path, build=plain)


def test_types_that_would_round_the_weights_are_refused_and_wider_ones_are_not(tmp_path):
    checkpoint.save(mlp(), Plan(), tmp_path)
    for narrow in (torch.float16, torch.bfloat16):
        with pytest.raises(
            ModelError, match=rf"is torch.float32 in the file and {narrow} .* build the network in torch.float32"
        ):
            secateurs.load(tmp_path, build=lambda dtype=narrow: mlp().to(dtype))
    assert torch.equal(secateurs.load(tmp_path, build=mlp().double())[0].weight, mlp()[0].weight.double())
    checkpoint.save(mlp().half(), Plan(), tmp_path)
    assert torch.equal(secateurs.load(tmp_path, build=mlp)[0].weight, mlp()[0].weight.half().float())
    with pytest.raises(ModelError, match=r"float16 in the file and torch\.bfloat16"):
        secateurs.load(tmp_path, build=mlp().bfloat16())


class Views(torch.nn.Module):
    """Buffers that are parts of other tensors, each other's or none of the network's."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.rand(10, 4, generator=generator)
        self.register_buffer("table", table)
        self.register_buffer("rows", table[2:5])
        self.register_buffer("slice", torch.rand(100, 4, generator=generator)[:3])
        self.register_buffer("columns", torch.rand(4, 6, generator=generator)[:, 1:3])
        self.register_buffer("row", torch.rand(1, 4, generator=generator).expand(3, 4))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("turned", torch.rand(3, 4, generator=generator).T)


def test_buffers_that_are_parts_of_tensors_come_back(tmp_path):
    views = Views()
    checkpoint.save(views, Plan(), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1500
    loaded = secateurs.load(tmp_path, build=lambda: Views(seed=1))
    state = loaded.state_dict()
    assert state.keys() == views.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in views.state_dict().items())
    assert loaded.rows.untyped_storage().data_ptr() == loaded.table.untyped_storage().data_ptr()


def test_files_of_safetensors_own_function_are_read(tmp_path):
    Plan().save(tmp_path / "plan.json")
    safetensors.torch.save_model(tied(), str(tmp_path / "model.safetensors"))
    assert torch.equal(secateurs.load(tmp_path, build=tied(seed=1)).head.weight, tied().head.weight)
    checkpoint.save(tied(), Plan(), tmp_path / "ours")
    read = tied(seed=1)
    safetensors.torch.load_model(read, str(tmp_path / "ours" / "model.safetensors"))
    assert torch.equal(read.head.weight, tied().head.weight)


def test_weights_that_were_two_are_not_loaded_into_one(tmp_path):
    apart = tied()
    apart.head.weight = torch.nn.Parameter(apart.head.weight.detach() + 1)
    checkpoint.save(apart, Plan(), tmp_path)
    with pytest.raises(ModelError, match="one in the network are several in the file"):
        secateurs.load(tmp_path, build=tied)
    checkpoint.save(tied(), Plan(), tmp_path)
    with pytest.raises(ModelError, match=r"the file lacks \['head\.weight'\]"):
        secateurs.load(tmp_path, build=lambda: apart)


class Remembers(torch.nn.Linear):
    def __init__(self, state):
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_a_state_of_a_module_is_saved_where_it_is_a_tensor_and_refused_otherwise(tmp_path):
    checkpoint.save(Remembers(torch.ones(3)), Plan(), tmp_path)
    assert torch.equal(secateurs.load(tmp_path, build=Remembers(torch.zeros(3))).state, torch.ones(3))
    checkpoint.save(Remembers(None), Plan(), tmp_path)
    assert secateurs.load(tmp_path, build=Remembers(None)).state is None
    with pytest.raises(ModelError, match=r"'_extra_state' of the network is a dict, .* Let `get_extra_state`"):
        checkpoint.save(Remembers({"scale": 1.0}), Plan(), tmp_path)


def test_a_network_without_values_is_refused(tmp_path):
    checkpoint.save(mlp(), Plan(), tmp_path)
    with pytest.raises(ModelError, match=r"'0\.weight' is on the meta device"):
        secateurs.load(tmp_path, build=mlp().to("meta"))


def test_a_build_that_returns_no_module(tmp_path):
    checkpoint.save(mlp(), Plan(), tmp_path)
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module, got dict"):
        secateurs.load(tmp_path, build=dict)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    checkpoint.save(mlp(), Plan(), tmp_path)
    torch.save(mlp().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="Pickled checkpoints are never read"):
        secateurs.load(tmp_path, build=mlp)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 200], ids=["empty", "zeros", "ones"])
def test_a_damaged_weights_file_is_a_model_error(tmp_path, content):
    checkpoint.save(mlp(), Plan(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        secateurs.load(tmp_path, build=mlp)


def test_a_truncated_weights_file_is_a_model_error(tmp_path):
    checkpoint.save(mlp(), Plan(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a safetensors file"):
        secateurs.load(tmp_path, build=mlp)


def test_missing_files(tmp_path):
    with pytest.raises(PlanError, match="cannot read the plan"):
        secateurs.load(tmp_path, build=mlp)
    Plan().save(tmp_path / "plan.json")
    with pytest.raises(ModelError, match="do not exist"):
        secateurs.load(tmp_path, build=mlp)


def test_the_plan_on_disk_is_json(tmp_path):
    _, plan = pruned_by_half("mlp", tmp_path)
    assert len(json.loads((tmp_path / "plan.json").read_text())["edits"]) == len(plan)
