"""Files that others wrote validate without special handling."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
import foreign
import odd

from secateurs.data import Dataset
from secateurs.errors import DataError
from secateurs.settings import TargetSettings
from secateurs_adapters.accuracy import agreement, compare_accuracy
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.commands import validate
from secateurs_adapters.metrics import accuracy
from secateurs_adapters.session import Session, run_dataset, seeded_inputs
from secateurs_adapters.signature import Signature, TensorSpec
from secateurs_adapters.vetting import Limits, limits_for, vet_file

OPSETS = (9, 11, 13, 15, 17, 18, 20)


def signature(*shapes):
    return Signature(tuple(TensorSpec(f"i{n}", np.dtype(np.float32), shape) for n, shape in enumerate(shapes)), "f")


@pytest.mark.parametrize(
    ("shapes", "fixed", "bound"),
    [
        pytest.param([("batch", 3)], None, [(2, 3)], id="named"),
        pytest.param([("s0", 3), ("s0", "s1")], None, [(2, 3), (2, 7)], id="first axis"),
        pytest.param([(None, 3), (None, None)], None, [(2, 3), (2, 7)], id="nameless"),
        pytest.param([("unk__1", 3), ("unk__2", 3)], None, [(2, 3), (2, 3)], id="a name for each"),
        pytest.param([(None, None, 8), (4, None, 16)], None, [(2, 7, 8), (4, 2, 16)], id="nameless state"),
        pytest.param([("steps", "batch", 4), (1, "batch", 6)], None, [(7, 2, 4), (1, 2, 6)], id="time first"),
        pytest.param([("seq_len", 4)], None, [(7, 4)], id="no batch"),
        pytest.param([("num_nodes", 4), (2, "num_edges")], None, [(7, 4), (2, 7)], id="graph"),
        pytest.param([(2, 3), (1, 2, 5)], 2, [(2, 3), (1, 2, 5)], id="fixed"),
        pytest.param([(), ("N", 3)], None, [(), (2, 3)], id="scalar first"),
        pytest.param(
            [("batch_size", "past"), ("batch_size", "past + new"), ("batch_size", "2*new"), ("batch_size", "past + 1")],
            None,
            [(2, 7), (2, 14), (2, 14), (2, 8)],
            id="sums and products",
        ),
        pytest.param([(-1, 3)], None, [(2, 3)], id="minus one"),
    ],
)
def test_the_batch_is_told_from_lengths(shapes, fixed, bound):
    found = signature(*shapes)
    assert found.fixed_batch() == fixed
    assert list(found.shapes(2, 7).values()) == bound


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_a_foreign_file_runs_and_agrees_with_itself(tmp_path, family, opset):
    session = Session(foreign.FAMILIES[family](tmp_path / "m.onnx", opset))
    length = 40 if family == "strided" else None
    size = session.fixed_batch() or 2
    outputs = session.run(seeded_inputs(session, size, length=length))
    session.bind(seeded_inputs(session, size, length=length), outputs)()
    shares = agreement(session, session, batch_size=size, length=length, examples=8)
    assert set(shares) == {name for name, value in outputs.items() if isinstance(value, np.ndarray)}
    assert set(shares.values()) == {1.0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", odd.RUN)
def test_an_odd_file_runs_and_agrees_with_itself(tmp_path, kind):
    session = Session(odd.write(tmp_path / "m.onnx", odd.RUN[kind]))
    feeds = seeded_inputs(session, session.fixed_batch() or 1)
    outputs = session.run(feeds)
    session.bind(feeds, outputs)()
    found = agreement(session, session, batch_size=session.fixed_batch() or 1, examples=8)
    assert found == {name: 1.0 for name, value in outputs.items() if isinstance(value, np.ndarray)}
    assert read_artifact(session.path).weight_bytes >= 0


def use(path):
    """Run a file once, and compare it with itself."""
    session = Session(path)
    session.run(seeded_inputs(session, 1))
    agreement(session, session, batch_size=1, examples=8)


@pytest.mark.parametrize("said", odd.REFUSED)
def test_what_cannot_be_fed_run_or_compared_is_refused_in_words(tmp_path, said):
    path = odd.write(tmp_path / "m.onnx", odd.REFUSED[said])
    with pytest.raises(DataError, match=re.escape(said)):
        use(path)


def test_labelled_data_is_run_in_the_batches_that_the_file_takes(tmp_path):
    """A file that says that its batch is free, and holds it to one."""
    session = Session(odd.write(tmp_path / "m.onnx", odd.RUN["a batch of one in fact"]))
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    data = Dataset({"x": x}, x.argmax(1), "made")
    assert compare_accuracy(session, session, data, accuracy).baseline.value == 1.0
    with pytest.raises(DataError, match="Reshape"):
        compare_accuracy(session, session, data, accuracy, batch_size=2)


def test_another_network_is_told_by_each_output(tmp_path):
    path = foreign.recurrent(tmp_path / "a.onnx", 17)
    model = onnx.load(str(path))
    # The forget gate's bias reaches the second cell state only through the first: with zero inputs to it, all outputs change.
    model.graph.initializer[1].raw_data = (3 * np.frombuffer(model.graph.initializer[1].raw_data, np.float32)).tobytes()
    onnx.save(model, str(tmp_path / "b.onnx"))
    shares = agreement(Session(path), Session(tmp_path / "b.onnx"), batch_size=2, examples=32)
    assert set(shares) == {"y", "h", "c"}
    assert all(share < 1 for share in shares.values())


def test_examples_come_first_in_data_and_go_where_the_file_has_them(tmp_path):
    session = Session(foreign.recurrent(tmp_path / "m.onnx", 17))
    generator = np.random.default_rng(0)
    data = {
        "x": generator.normal(size=(5, 9, 4)).astype(np.float32),
        "h0": generator.normal(size=(5, 1, 6)).astype(np.float32),
        "c0": generator.normal(size=(5, 1, 6)).astype(np.float32),
    }
    whole = session.run({name: np.ascontiguousarray(np.moveaxis(array, 0, 1)) for name, array in data.items()})
    for size in (1, 2, 5):
        found = run_dataset(session, data, size)
        assert found["y"].shape == (5, 9, 1, 6)
        np.testing.assert_allclose(found["y"], np.moveaxis(whole["y"], 2, 0), atol=1e-6)
        np.testing.assert_allclose(found["h"], np.moveaxis(whole["h"], 1, 0), atol=1e-6)


def test_an_input_without_examples_takes_what_all_examples_share(tmp_path):
    session = Session(foreign.nameless(tmp_path / "m.onnx", 17))
    data = {"a": np.ones((3, 7), np.float32), "b": np.ones((3, 7), np.float32), "scale": np.full(3, 2, np.float32)}
    np.testing.assert_allclose(run_dataset(session, data, 2)["y"], np.full((3, 7), 4.0))
    with pytest.raises(DataError, match=r"input 'scale'.*shape \[\], but the data has \[3\]"):
        run_dataset(session, data | {"scale": np.arange(3, dtype=np.float32)}, 3)


class Cell(torch.nn.Module):
    """A GRU with its state in and out, and a mask of integers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gru = torch.nn.GRU(4, 6, batch_first=True)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x, state, mask):
        hidden, state = self.gru(x * mask[..., None].to(x.dtype), state)
        return self.head(hidden[:, -1]), state


def export_cell(path, dynamo, opset):
    example = (torch.randn(2, 5, 4), torch.randn(1, 2, 6), torch.ones(2, 5, dtype=torch.long))
    names = ["x", "state", "mask"]
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    axes = (
        {"dynamic_shapes": ({0: batch, 1: time}, {1: batch}, {0: batch, 1: time})}
        if dynamo
        else {
            "dynamic_axes": {
                "x": {0: "batch", 1: "time"},
                "state": {1: "batch"},
                "mask": {0: "batch", 1: "time"},
                "new": {1: "batch"},
                "y": {0: "batch"},
            }
        }
    )
    torch.onnx.export(
        Cell().eval(),
        example,
        str(path),
        input_names=names,
        output_names=["y", "new"],
        opset_version=opset,
        dynamo=dynamo,
        **axes,
    )
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [9, 13, 17])
def test_a_recurrent_export_of_torch_runs(tmp_path, opset):
    session = Session(export_cell(tmp_path / "m.onnx", False, opset))
    assert session.signature.shapes(3, 8) == {"x": (3, 8, 4), "state": (1, 3, 6), "mask": (3, 8)}
    data = {
        "x": np.random.default_rng(0).normal(size=(4, 8, 4)).astype(np.float32),
        "state": np.zeros((4, 1, 6), np.float32),
        "mask": np.ones((4, 8), np.int64),
    }
    expected, _ = Cell().eval()(torch.tensor(data["x"]), torch.zeros(1, 4, 6), torch.ones(4, 8))
    np.testing.assert_allclose(run_dataset(session, data, 3)["y"], expected.detach().numpy(), atol=1e-5)


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(validate)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def judged(run, path, *more):
    done = run(path, path, "--repeats", 4, "--json", *more)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", ["recurrent", "cached", "strided", "fixed", "classes"])
def test_the_command_takes_foreign_files(tmp_path, run, family):
    report = judged(run, foreign.FAMILIES[family](tmp_path / "m.onnx", 13))
    figures = report["candidate"]["targets"][0]
    assert figures["batch_size"] == (3 if family == "fixed" else 1)
    assert figures["sequence_length"] == (32 if family == "strided" else None)
    assert any("does not run at 16" in note for note in report["notes"]) == (family == "strided")
    assert figures["time_per_provider"] == {"CPUExecutionProvider": pytest.approx(1.0)}
    assert set(report["ratios"]["targets"][0]["agreement_per_output"].values()) == {1.0}


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_the_command_takes_every_foreign_file(tmp_path, run, family, opset):
    judged(run, foreign.FAMILIES[family](tmp_path / "m.onnx", opset))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", odd.RUN)
def test_the_command_takes_every_odd_file(tmp_path, run, kind):
    judged(run, odd.write(tmp_path / "m.onnx", odd.RUN[kind]))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 9), (False, 17), (True, 18), (True, 20)])
def test_the_command_takes_exports_of_torch(tmp_path, run, dynamo, opset):
    report = judged(run, export_cell(tmp_path / "m.onnx", dynamo, opset), "--sequence-length", 8, "--batch-size", 3)
    assert report["candidate"]["targets"][0]["sequence_length"] == 8


def test_several_sizes_are_several_targets(tmp_path, run):
    path = foreign.tokens(tmp_path / "m.onnx", 17)
    sizes = ["--batch-size", 1, "--batch-size", 4, "--sequence-length", 8]
    report = judged(run, path, *sizes)
    labels = [(one["batch_size"], one["sequence_length"]) for one in report["candidate"]["targets"]]
    assert labels == [(1, 8), (4, 8)]


def vet(path, *, limits=None, **settings):
    artifact = read_artifact(path)
    return vet_file(artifact, TargetSettings.model_validate(settings), limits or limits_for(artifact), adopt_batch=True)


def test_a_file_that_wants_too_much_memory_is_refused_in_its_own_process(tmp_path):
    path = foreign.image(tmp_path / "m.onnx", 17, shape=(1, 3, 9000, 9000))
    with pytest.raises(DataError, match=r"512 MiB and 10 s; `--memory-limit`"):
        vet(path)


def test_a_file_that_does_not_load_within_its_memory_is_refused(tmp_path):
    with pytest.raises(DataError, match="bad_alloc"):
        vet(foreign.image(tmp_path / "m.onnx", 17), limits=Limits(60, 2**16))


def test_a_file_that_takes_too_long_is_ended(tmp_path):
    path = foreign.image(tmp_path / "m.onnx", 17)
    with pytest.raises(DataError, match=r"ended after 0.05 s"):
        vet(path, limits=Limits(0.05, 2**29))
    found = vet(path, limits=Limits(60, 2**29))
    assert (found.batch_size, found.sequence_length) == (1, None)
    assert found.run_ms > 0


def test_a_process_that_dies_is_the_users_error(tmp_path, monkeypatch):
    path = foreign.image(tmp_path / "m.onnx", 17)
    monkeypatch.setattr("secateurs_adapters.vetting.LENGTHS", ())  # the process then finds nothing to try, and fails
    with pytest.raises(DataError, match="does not run in a process of its own, where it may take 512 MiB and 10 s"):
        vet(path)


def test_data_that_has_its_own_sizes_needs_no_length(tmp_path):
    session = Session(foreign.tokens(tmp_path / "m.onnx", 17))
    data = Dataset(
        {
            "input_ids": np.zeros((4, 3), np.int64),
            "attention_mask": np.ones((4, 3), np.int64),
            "features": np.zeros((4, 1, 8), np.float32),
        },
        None,
        "made",
    )
    assert agreement(session, session, inputs=data.inputs) == {"states": 1.0, "pooled": 1.0}
