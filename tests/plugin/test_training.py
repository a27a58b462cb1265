"""The training loop itself: its steps, its two ways to run, precision, early stopping, and going on after an interruption."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from networks import images, plain, residual, seeded, tied
from torch import nn

from secateurs import processes
from secateurs.data import Dataset
from secateurs.errors import ProviderError, RecipeError, SecateursError, UserError
from secateurs.forward import predict
from secateurs.recovery import _loss, train
from secateurs.settings import RecoverySettings
from secateurs.training_state import FILE

DATA = images(97, labels=True)
LOOPS = ["plain", "accelerate"]


@seeded
def noisy():
    """BatchNorm and dropout: every kind of state that a training has."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(216, 5)
    )


@seeded
def normless():
    """No layer mixes the examples of a batch, so that any division of it into parts gives the same gradients."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 8), nn.Tanh(), nn.Linear(8, 5)
    ).double()


def double(data):
    return Dataset({name: array.astype(np.float64) for name, array in data.inputs.items()}, data.labels)


def same(first, second, **tolerance):
    """Compare all parameters and buffers; exactly, if no tolerance is given."""
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(
            value, other, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda text, n=name: f"{n}: {text}"
        )


def differ(first, second):
    return any(
        not torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# --- the steps ----------------------------------------------------------------------------------------------------------


def softmax(values):
    shifted = np.exp(values - values.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def adamw_by_hand(weights, inputs, labels, order, *, rate, decay, batch):
    """Return the weights of softmax regression after one pass: AdamW, global clipping to 1 and the schedule, from their definitions."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    steps = math.ceil(len(order) / batch)
    warm = max(1, steps // 10)
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        x, target = inputs[chosen], np.eye(weights.shape[0])[labels[chosen]]
        gradient = (softmax(x @ weights.T) - target).T @ x / len(chosen)
        gradient /= max(1.0, np.linalg.norm(gradient) + 1e-6)
        share = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        weights = weights * (1 - rate * share * decay) - rate * share * mean / (np.sqrt(spread) + 1e-8)
    return weights


@pytest.mark.parametrize("loop", LOOPS)
def test_the_steps_are_those_of_adamw_with_clipping_and_a_cosine(loop):
    generator = np.random.default_rng(0)
    inputs, labels = 3 * generator.normal(size=(250, 7)), generator.integers(0, 4, 250)
    model = nn.Linear(7, 4, bias=False).double()
    before = model.weight.detach().numpy().copy()
    settings = RecoverySettings(epochs=1, batch_size=10, learning_rate=0.05, weight_decay=0.1, loop=loop)
    train(model, Dataset({"input": inputs}, labels), settings, seed=3)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(3)).numpy()
    expected = adamw_by_hand(before, inputs, labels, order, rate=0.05, decay=0.1, batch=10)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loop", LOOPS)
def test_distillation_finds_the_only_optimum(loop):
    """A softmax regression that learns from another has one optimum: the teacher's probabilities."""
    inputs = Dataset({"input": np.random.default_rng(0).normal(size=(200, 6))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()
    settings = RecoverySettings(epochs=60, batch_size=50, learning_rate=0.1, weight_decay=0, temperature=1, loop=loop)
    train(student, inputs, settings, teacher=teacher)
    found, wanted = (predict(model, inputs).softmax(1) for model in (student, teacher))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("build", [plain, residual, noisy], ids=["plain", "residual", "dropout"])
def test_both_loops_give_the_same_weights(build):
    first, second = build(), build()
    for model, loop in ((first, "plain"), (second, "accelerate")):
        settings = RecoverySettings(epochs=2, batch_size=16, loop=loop)
        train(model, DATA, settings, teacher=build(seed=1), evaluate=lambda _: 0.0)
    same(first, second, rtol=1e-6, atol=1e-7)
    assert differ(first, build())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", [96, 97, 101, 115], ids=["whole", "one left", "five left", "nineteen left"])
def test_accumulated_batches_are_one_large_batch(size, loop):
    data = double(images(size, labels=True))
    large, small = normless(), normless()
    for model, batch, accumulated in ((large, 24, 1), (small, 8, 3)):
        settings = RecoverySettings(epochs=2, batch_size=batch, gradient_accumulation=accumulated, loop=loop)
        train(model, data, settings, teacher=normless(seed=1).requires_grad_(False))
    same(large, small, rtol=1e-8, atol=1e-10)
    assert differ(large, normless())


def test_accumulated_batches_hold_no_more_examples_than_asked():
    seen = []
    model = normless()
    model[0].register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    settings = RecoverySettings(epochs=1, batch_size=8, gradient_accumulation=3)
    train(model, double(images(60, labels=True)), settings)
    assert sum(seen) == 60
    assert max(seen) <= 8
    assert len(seen) == 3 + 3 + 2


def test_parts_of_a_batch_weigh_by_the_labels_that_count():
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 20, size=(9, 6))
    labels = np.where(generator.random((9, 6)) < 0.6, -100, inputs)
    model, whole = tied(), Dataset({"input": inputs}, labels)
    settings = RecoverySettings()
    parts = [whole.take(range(start, stop)) for start, stop in ((0, 2), (2, 3), (3, 9))]
    shares = sum(float(_loss(model, None, part, settings, whole).detach()) for part in parts)
    flat = predict(model, whole).reshape(-1, 20).double().numpy()
    counted = labels.reshape(-1) != -100
    expected = -np.log(softmax(flat)[counted, labels.reshape(-1)[counted]]).mean()
    assert shares == pytest.approx(expected, rel=1e-5)
    assert float(_loss(model, None, whole, settings).detach()) == pytest.approx(expected, rel=1e-5)


class PerToken(nn.Module):
    """A prediction for every token, padding included, as encoders give it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 5)

    def forward(self, input_ids, attention_mask):
        return self.embedding(input_ids)


def test_distillation_leaves_padding_out():
    generator = np.random.default_rng(0)
    lengths = np.array([6, 1, 4, 2, 3])
    mask = (np.arange(6) < lengths[:, None]).astype(np.int64)
    whole = Dataset({"input_ids": generator.integers(0, 20, (5, 6)), "attention_mask": mask}, keyword=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = PerToken(), PerToken()
    settings = RecoverySettings(temperature=2.0)
    p, q = (softmax(predict(model, whole).double().numpy()[mask == 1] / 2) for model in (teacher, student))
    expected = 4 * (p * np.log(p / q)).sum(1).mean()
    assert float(_loss(student, teacher, whole, settings).detach()) == pytest.approx(expected, rel=1e-5)
    parts = [whole.take(range(start, stop)) for start, stop in ((0, 1), (1, 5))]
    shares = sum(float(_loss(student, teacher, part, settings, whole).detach()) for part in parts)
    assert shares == pytest.approx(expected, rel=1e-5)


def test_a_single_example_trains_only_without_batch_norm():
    one = images(1, labels=True)
    steps = []
    note = lambda *event: steps.append(event[0])  # noqa: E731
    train(residual(), images(9, labels=True), RecoverySettings(epochs=1, batch_size=8), progress=note)
    train(normless(), double(one), RecoverySettings(epochs=1, batch_size=1), progress=note)
    assert steps == [1, 1]
    with pytest.raises(RecipeError, match=r"recovery\.batch_size: 1` cannot train a network with BatchNorm"):
        train(residual(), DATA, RecoverySettings(epochs=1, batch_size=1))


# --- precision and the choice of the loop -------------------------------------------------------------------------------


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    model, exact = plain(), plain()
    seen = set()
    model[0].register_forward_hook(lambda module, given, out: seen.add((module.training, out.dtype)))
    settings = {"epochs": 6, "batch_size": 16, "learning_rate": 1e-2}

    def evaluate(network):
        return -float(nn.functional.cross_entropy(predict(network, DATA), torch.from_numpy(DATA.labels)))

    before = evaluate(model)
    train(model, DATA, RecoverySettings(precision="bf16", **settings), evaluate=evaluate)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}  # decisions are made in full precision
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert evaluate(model) > 0.9 * before
    train(exact, DATA, RecoverySettings(**settings), evaluate=evaluate)
    assert differ(model, exact)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="speaks of machines without a GPU")
def test_float16_on_a_cpu_is_an_error():
    with pytest.raises(ProviderError, match="fp16` needs a GPU, and the network is on the CPU; set `precision: bf16`"):
        train(plain(), DATA, RecoverySettings(epochs=1, precision="fp16"))


def test_the_plain_loop_has_no_mixed_precision():
    with pytest.raises(RecipeError, match=r"needs accelerate, and `recovery\.loop` is 'plain'"):
        train(plain(), DATA, RecoverySettings(epochs=1, precision="bf16", loop="plain"))


def test_yaml_reads_a_bare_no_as_false_and_it_means_no():
    assert RecoverySettings(precision=False).precision == "no"
    with pytest.raises(ValueError, match="'no', 'bf16' or 'fp16'"):
        RecoverySettings(precision=True)


@pytest.mark.parametrize(
    ("options", "named"), [({"precision": "bf16"}, "precision: bf16"), ({"loop": "accelerate"}, "loop: accelerate")]
)
def test_without_accelerate_what_needs_it_is_an_error(options, named, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # Python's own way to say that a module cannot be imported
    with pytest.raises(
        RecipeError, match=rf"`recovery\.{named}` needs accelerate, .* pip install 'secateurs\[train\]'"
    ):
        train(plain(), DATA, RecoverySettings(epochs=1, **options))


def test_without_accelerate_training_is_plain(monkeypatch):
    with_it, without = plain(), plain()
    train(with_it, DATA, RecoverySettings(epochs=1))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    train(without, DATA, RecoverySettings(epochs=1))
    same(with_it, without, rtol=1e-6, atol=1e-7)


def test_the_callers_accelerator_is_left_as_it_was(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, GradientState, PartialState)
    try:
        theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)
        theirs.gradient_state._set_sync_gradients(False)  # in the middle of their accumulation
        before = [dict(state._shared_state) for state in states]
        model, alone = plain(), plain()
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
        train(model, DATA, RecoverySettings(epochs=1, loop="accelerate"))
        train(alone, DATA, RecoverySettings(epochs=1, loop="plain"))
        same(model, alone, rtol=1e-6, atol=1e-7)
        assert [dict(state._shared_state) for state in states] == before
        assert theirs.mixed_precision == "bf16"
        assert not theirs.sync_gradients
    finally:
        for state in states:
            state._shared_state.clear()


# --- early stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("scores", "patience", "epochs"),
    [
        ((0.5, 0.6, 0.5, 0.4, 0.9, 0.9), 2, 3),
        ((0.5, 0.4, 0.9, 0.9, 0.9, 0.9), 1, 1),
        ((0.5, 0.5, 0.5, 0.9, 0.9, 0.9), 2, 2),
        ((0.5, 0.4, 0.6, 0.5, 0.7, 0.6), 2, 5),
    ],
    ids=["after the best", "at once", "equal is not better", "never"],
)
def test_patience_stops_the_training(scores, patience, epochs, loop):
    left, seen = iter(scores), []
    settings = RecoverySettings(epochs=5, batch_size=50, patience=patience, loop=loop)
    train(plain(), DATA, settings, evaluate=lambda _: next(left), progress=lambda *event: seen.append(event))
    assert len([event for event in seen if event[2].startswith("epoch")]) == epochs
    assert seen[-1][0] == seen[-1][1] == 2 * epochs
    assert seen[-1][2].startswith("epoch 5" if epochs == 5 else f"no better for {patience} epoch")


def test_patience_without_a_metric_is_an_error():
    with pytest.raises(RecipeError, match=r"recovery\.patience: 2` needs a metric on validation data"):
        train(plain(), DATA, RecoverySettings(epochs=1, patience=2))


# --- going on after an interruption -------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def score(model):
    """A metric that rises and falls, so that the best epoch is not the last."""
    return -abs(float(model[5].weight.detach().norm()) - 3.37)


def interrupted(model, folder, settings, *, after, **options):
    """Train until `after` steps are done, and return how many were seen."""
    seen = []

    def progress(done, total, word):
        seen.append(done)
        if done == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(model, DATA, settings, checkpoint=folder, progress=progress, evaluate=score, **options)
    return seen


@pytest.mark.parametrize(
    "loops", [("plain", "plain"), ("accelerate", "accelerate"), ("accelerate", "plain")], ids="-".join
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_training_ends_like_an_uninterrupted_one(loops, precision, tmp_path):
    if precision != "no" and "plain" in loops:
        pytest.skip("the plain loop has no mixed precision")
    first, then = (
        RecoverySettings(
            epochs=4, batch_size=16, learning_rate=0.02, gradient_accumulation=2, loop=loop, precision=precision
        )
        for loop in loops
    )
    teacher = noisy(seed=1)
    whole, model = noisy(), noisy()
    train(whole, DATA, first, teacher=teacher, evaluate=score)
    interrupted(model, tmp_path, first, after=5, teacher=teacher)  # in the second epoch, of three steps
    resumed, seen = noisy(), []
    train(
        resumed,
        DATA,
        then,
        teacher=teacher,
        evaluate=score,
        checkpoint=tmp_path,
        progress=lambda *event: seen.append(event[0]),
    )
    assert seen[0] == 4
    same(resumed, whole)
    again = noisy()
    train(
        again,
        DATA,
        then,
        teacher=teacher,
        evaluate=score,
        checkpoint=tmp_path,
        progress=lambda *_: pytest.fail("trained again"),
    )
    same(again, whole)


def test_patience_goes_on_where_it_was(tmp_path):
    settings = RecoverySettings(epochs=6, batch_size=50, patience=3)
    model, scores = noisy(), iter((0.5, 0.4, 0.3))
    with pytest.raises(StopIteration):
        train(model, DATA, settings, evaluate=lambda _: next(scores), checkpoint=tmp_path)
    resumed, scores = noisy(), iter((0.2,))
    train(resumed, DATA, settings, evaluate=lambda _: next(scores), checkpoint=tmp_path)
    same(resumed, noisy())  # the start was the best


@pytest.mark.parametrize("changed", ["settings", "seed", "data", "labels", "model", "frozen", "teacher", "metric"])
def test_the_state_of_another_training_is_ignored(changed, tmp_path):
    options = {
        "settings": RecoverySettings(epochs=2, batch_size=16),
        "seed": 0,
        "teacher": noisy(seed=1),
        "evaluate": score,
    }
    data = DATA
    model = noisy()
    interrupted(noisy(), tmp_path, options["settings"], after=9, seed=0, teacher=options["teacher"])
    if changed == "settings":
        options["settings"] = RecoverySettings(epochs=2, batch_size=16, learning_rate=2e-3)
    elif changed == "seed":
        options["seed"] = 1
    elif changed == "data":
        data = Dataset({"input": DATA.inputs["input"] * np.float32(1.0001)}, DATA.labels)
    elif changed == "labels":
        data = Dataset(DATA.inputs, np.roll(DATA.labels, 1))
    elif changed == "model":
        model = noisy(seed=5)
    elif changed == "frozen":
        model[0].requires_grad_(False)
    elif changed == "teacher":
        options["teacher"] = noisy(seed=2)
    else:
        options["evaluate"] = None
    alone = copy.deepcopy(model)
    train(alone, data, **options)
    train(model, data, checkpoint=tmp_path, **options)
    same(model, alone)


def damage(path, how):
    raw = path.read_bytes()
    if how == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "garbage":
        path.write_bytes(b"\x80\x04not safetensors")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if how == "numbers":
            header["secateurs"] = json.dumps(json.loads(header["secateurs"]) | {"epoch": "two"})
        elif how == "header":
            header = {}
        elif how == "missing":
            del tensors["model/0.weight"]
        elif how == "shape":
            tensors["kept/0.weight"] = torch.zeros(2, 2)
        elif how == "moments":
            tensors["optimiser/0.exp_avg"] = torch.zeros(1, 2)
        elif how == "parameter":
            tensors["optimiser/77.exp_avg"] = torch.zeros(1, 2)
        safetensors.torch.save_file(tensors, str(path), header)


@pytest.mark.parametrize(
    "how", ["short", "garbage", "empty", "folder", "numbers", "header", "missing", "shape", "moments", "parameter"]
)
def test_a_broken_state_is_ignored(how, tmp_path):
    settings = RecoverySettings(epochs=2, batch_size=16)
    interrupted(noisy(), tmp_path, settings, after=9)
    damage(tmp_path / FILE, how)
    model, alone = noisy(), noisy()
    train(alone, DATA, settings, evaluate=score)
    if how == "folder":
        with pytest.raises(OSError):  # noqa: PT011 - whatever the system says of a file that cannot be written
            train(model, DATA, settings, evaluate=score, checkpoint=tmp_path)
        return
    train(model, DATA, settings, evaluate=score, checkpoint=tmp_path)
    same(model, alone)


def test_tied_and_frozen_parameters_are_kept(tmp_path):
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 20, size=(32, 6))
    data = Dataset({"input": inputs}, (inputs + 1) % 20)
    settings = RecoverySettings(epochs=2, batch_size=8)
    whole, model, resumed = tied(), tied(), tied()
    train(whole, data, settings)

    def progress(done, total, word):
        if done == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(model, data, settings, checkpoint=tmp_path, progress=progress)
    train(resumed, data, settings, checkpoint=tmp_path)
    same(resumed, whole)
    assert resumed.head.weight is resumed.embedding.weight


def test_the_folder_holds_one_file(tmp_path):
    train(noisy(), DATA, RecoverySettings(epochs=2), evaluate=score, checkpoint=tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [FILE]


# --- several processes --------------------------------------------------------------------------------------------------

SHARED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import safetensors.torch
import torch
from networks import images, residual
from test_training import double, normless
from secateurs import processes
from secateurs.recovery import train
from secateurs.settings import RecoverySettings

folder, rank = Path(sys.argv[2]), processes.rank()
data = double(images(49, labels=True))  # the last step has one example: one process has none
model = normless(seed=0 if rank == 0 else 3)  # the main process's weights count
model[0].requires_grad_(False)
model.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
settings = RecoverySettings(epochs=3, batch_size=16, weight_decay=0.1)
scores = iter((0.1, 0.2, 0.3, 0.2) if rank == 0 else (0.4, 0.3, 0.2, 0.1))  # the main process's scores count
train(model, data, settings, teacher=normless(seed=1), evaluate=lambda _: next(scores), checkpoint=folder / "state")
safetensors.torch.save_file(model.state_dict(), str(folder / f"shared{rank}.safetensors"))
normed = residual()
train(normed, images(50, labels=True), RecoverySettings(epochs=1, batch_size=16))
safetensors.torch.save_file(normed.state_dict(), str(folder / f"normed{rank}.safetensors"))
try:
    train(normless(), double(images(20 + rank, labels=True)), settings)
except Exception as error:
    (folder / f"error{rank}").write_text(str(error))
    (folder / f"told{rank}").write_text(str(processes.from_main(lambda: 7 * rank + 5, str, int)))
"""


def launched(program, *arguments, count=2):
    """Run a program as several processes with torch's own launcher, on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(program),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def test_several_processes_train_like_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SHARED)
    done = launched(program, Path(__file__).parent, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (safetensors.torch.load_file(tmp_path / f"shared{rank}.safetensors") for rank in (0, 1))
    model = normless()
    model[0].requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    scores = iter((0.1, 0.2, 0.3, 0.2))
    settings = RecoverySettings(epochs=3, batch_size=16, weight_decay=0.1)
    train(model, double(images(49, labels=True)), settings, teacher=normless(seed=1), evaluate=lambda _: next(scores))
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-10)
    assert torch.equal(first["unused"], torch.ones(3, dtype=torch.float64))
    assert [path.name for path in (tmp_path / "state").iterdir()] == [FILE]
    normed = [safetensors.torch.load_file(tmp_path / f"normed{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(value, normed[1][name]) for name, value in normed[0].items())
    for rank in (0, 1):
        text = (tmp_path / f"error{rank}").read_text()
        assert f"process {rank} of 2 does not train the same network on the same data" in text
        assert (tmp_path / f"told{rank}").read_text() == "5"


def test_one_process_is_the_main_one(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.from_main(lambda: {1}, write=repr, read=eval) == {1}
    monkeypatch.setenv("RANK", "3")  # alone, without a size, it means nothing
    assert processes.is_main()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (processes.count(), processes.rank(), processes.is_main()) == (4, 3, False)


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"2 processes were started .* pip install 'secateurs\[train\]'"):
        train(plain(), DATA, RecoverySettings(epochs=1))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loss_that_overflows_says_so_before_the_step(loop):
    model = plain()
    with torch.no_grad():
        model[7].weight *= 1e39
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SecateursError, match=r"loss is (nan|inf) at step 0; lower"):
        train(model, DATA, RecoverySettings(epochs=1, loop=loop))
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
