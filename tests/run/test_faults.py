"""Faults of the machine and of the user's files: a clear end, the exit code of the contract, and no half file under a final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from secateurs import cli
from secateurs.errors import SecateursError, UserError
from secateurs.faults import told
from secateurs.files import write_text
from secateurs.plan import Plan
from secateurs.proof import environment
from secateurs.recipe import load_recipe
from secateurs.report import Report
from secateurs.run_folder import OUTPUTS, STATE, open_folder
from secateurs.shipping import Shipping
from secateurs_adapters.fresh import in_fresh_process

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/quickstart.yaml"
QUICK = [
    "passes=[{magnitude: {target_units: 0.5}}]",
    "recovery={epochs: 2}",
    "budget={macs_ratio: 0.99}",
    "targets=[{provider: CPUExecutionProvider, threads: 1, batch_size: 1}]",
]
"""A pass, a training that can be interrupted, and a verdict that hangs on no measured time."""


def started(out: Path, *more: str, limit: int | None = None) -> subprocess.Popen[str]:
    """Start the quick recipe in a process of its own, with a limit on the size of files where one is given."""

    def limited() -> None:
        import resource

        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    overrides = [part for item in QUICK for part in ("--set", item)]
    command = [sys.executable, "-m", "secateurs", "run", RECIPE, "--output", str(out), *overrides, *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limited
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and what was said on stderr, on one line."""
    return process.wait(), " ".join(process.communicate(timeout=600)[1].split())


def whole(out: Path) -> None:
    """Check that whatever has a final name can be read, and that nothing else lies around."""
    for path in out.rglob("*"):
        if path.is_file():
            assert path.stat().st_size, f"{path} is empty"
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.suffix == ".safetensors":
                safetensors.torch.load_file(path)


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path):
    code, said = ended(started(tmp_path / "out", limit=20_000))
    assert code == 3, said
    assert said.startswith("error:")
    assert "would become larger than is allowed" in said
    assert "--resume" in said
    whole(tmp_path / "out")
    assert not set(OUTPUTS) & {"plan.json", "report.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_an_output_that_cannot_be_written_is_the_users_error(secateurs, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = secateurs("run", RECIPE, "--output", tmp_path / "file" / "out")
    assert done.code == 2
    assert "cannot write the output folder" in done.err or "not a plain folder" in done.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_an_error_of_the_disk_half_way_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match=r"report\.json") as caught:
        write_text(path, "new")
    assert "the run stopped at" in (told(caught.value) or "")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), "device failed or is gone"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device failed or is gone"),
        (RuntimeError("No CUDA-capable device is detected"), "device failed or is gone"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "device's memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            "memory does not",
        ),
        (MemoryError(), "memory does not"),
        (safetensors.SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
    ],
)
def test_faults_are_told_in_words(error, words, monkeypatch, capsys):
    """No device can be pulled out here: what is tested is that its errors come out of the command line in words, with exit code 3."""

    def broken() -> None:
        raise error

    monkeypatch.setattr(cli, "_manager", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["passes"])
    assert stopped.value.code == 3
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "Traceback" not in said


def test_errors_that_are_no_faults_keep_their_own_words():
    assert told(ValueError("no space left")) is None
    assert told(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert told(FileNotFoundError(errno.ENOENT, "No such file or directory", "a")) is None


def test_a_child_that_is_killed_is_an_error_in_words(tmp_path, monkeypatch):
    """The kernel ends a process that takes too much memory by SIGKILL."""
    (tmp_path / "greedy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SecateursError, match=r"killed by signal 9, perhaps for want of memory"):
        in_fresh_process("greedy", {})


@pytest.mark.parametrize("what", ["weights", "data"])
def test_values_that_are_not_finite_are_refused_before_anything_is_written(secateurs, tmp_path, what):
    out = tmp_path / "out"
    if what == "weights":
        tensors = safetensors.torch.load_file(ROOT / "examples" / "digits_resnet.safetensors")
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        tensors[name].view(-1)[0] = float("nan")
        safetensors.torch.save_file(tensors, tmp_path / "nan.safetensors")
        override = f"model.weights={tmp_path / 'nan.safetensors'}"
    else:
        images = np.zeros((64, 1, 8, 8), np.float32)
        images[3, 0, 0, 0] = np.nan
        np.savez(tmp_path / "nan.npz", images=images, labels=np.arange(64) % 10)
        override = f"data.calibration={{source: npz, file: {tmp_path / 'nan.npz'}}}"
    done = secateurs("run", RECIPE, "--output", out, "--set", override)
    assert done.code == 2, done
    assert "nan" in done.err.lower()
    assert not out.exists()


def test_a_run_that_was_killed_at_its_very_start_is_resumed(tmp_path):
    """The folder is there, and nothing in it says yet whose it is."""
    digest = load_recipe(ROOT / RECIPE).digest()
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / ".state.json.abc.partial").touch()
    (tmp_path / ".model.onnx.abc.partial").mkdir()
    with pytest.raises(UserError, match="another recipe"):
        open_folder(tmp_path, digest, resume=True, overwrite=False)
    (tmp_path / ".model.onnx.abc.partial").rmdir()
    assert open_folder(tmp_path, digest, resume=True, overwrite=False) is None


def test_resume_refuses_data_that_have_changed(secateurs, tmp_path, monkeypatch):
    """An interrupted run whose passes are over goes on with the same data alone."""
    out, file = tmp_path / "out", tmp_path / "train.npz"
    generator = np.random.default_rng(0)
    labels = np.arange(64) % 10
    np.savez(file, images=generator.random((64, 1, 8, 8), dtype=np.float32), labels=labels)
    before = file.read_bytes()
    options = [*QUICK, f"data.calibration={{source: npz, file: {file}}}", "recovery={epochs: 0}"]
    command = ["run", RECIPE, "--output", out, *(part for item in options for part in ("--set", item))]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Shipping, "prove", interrupt)
    assert secateurs(*command).code == 3
    assert (out / STATE / "pass1").is_dir()
    np.savez(file, images=generator.random((64, 1, 8, 8), dtype=np.float32), labels=labels)
    refused = secateurs(*command, "--resume")
    assert refused.code == 2
    assert "its data" in refused.err
    assert "--overwrite" in refused.err
    file.write_bytes(before)
    assert secateurs(*command, "--resume").code == 3, "it goes on to where it is interrupted again"


def test_a_finished_run_is_known_by_what_it_was_made_from(tmp_path):
    made = Report(verdict="pass", environment=environment(0, 1), digest="a" * 64)
    _write_finished(tmp_path, made)
    assert open_folder(tmp_path, "a" * 64, resume=True, overwrite=False) == made
    with pytest.raises(UserError, match="its data or the code of its factory have changed"):
        open_folder(tmp_path, "b" * 64, resume=True, overwrite=False)


@pytest.mark.parametrize(
    "name", ["plan.json", "model.safetensors", "baseline.onnx", "model.onnx", "model.onnx.data", "model.edge.ort"]
)
def test_the_verdict_of_a_finished_run_is_not_repeated_without_its_files(tmp_path, name):
    made = Report(verdict="pass", environment=environment(0, 1), digest="a" * 64)
    _write_finished(tmp_path, made)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"its file '{name}' is missing.*--overwrite"):
        open_folder(tmp_path, "a" * 64, resume=True, overwrite=False)
    _write_finished(tmp_path, made)
    if name.startswith(("model.onnx", "baseline.onnx", "model.edge")):
        (tmp_path / name).write_bytes(b"other")
        with pytest.raises(UserError, match=f"its file '{name}' has changed.*--overwrite"):
            open_folder(tmp_path, "a" * 64, resume=True, overwrite=False)


@pytest.mark.parametrize(
    "name", ["../other", "/etc/passwd", "C:\\other", "a\0b", "a" * 300], ids=["up", "root", "drive", "null", "long"]
)
def test_a_finished_run_names_no_file_elsewhere(tmp_path, name):
    """What lies in an output folder may come from strangers."""
    _write_finished(tmp_path, Report(verdict="pass", environment=environment(0, 1), digest="a" * 64))
    for body in ({"sha256": {name: "0"}}, {"sha256": {}, "made": {"beside": {name: {"sha256": "0"}}}}):
        (tmp_path / "model.onnx.json").write_text(json.dumps(body))
        with pytest.raises(UserError, match="must name a file below this folder"):
            open_folder(tmp_path, "a" * 64, resume=True, overwrite=False)


def _write_finished(folder: Path, made: Report) -> None:
    """Write what a finished run leaves, as far as a resumed one looks at it."""
    (folder / "report.json").write_text(made.to_json())
    (folder / "recipe.yaml").write_bytes((ROOT / RECIPE).read_bytes())
    hashes = {}
    for name in ("plan.json", "model.safetensors", "baseline.onnx", "model.onnx", "model.onnx.data", "model.edge.ort"):
        (folder / name).write_text(name)
        hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    for name, listed, beside in (
        ("baseline.onnx", ["baseline.onnx"], []),
        ("model.onnx", ["model.onnx", "model.onnx.data"], []),
        ("model.edge.onnx", [], ["model.edge.ort"]),
    ):
        (folder / name).touch()
        body = {"file": name, "sha256": {one: hashes[one] for one in listed}}
        body["made"] = {"beside": {one: {"bytes": 1, "sha256": hashes[one]} for one in beside}} if beside else None
        (folder / f"{name}.json").write_text(json.dumps(body))


def _kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Kill a run at random times, resume until it ends, and compare plan and weights with those of a run that nobody killed."""
    began = time.monotonic()
    code, said = ended(started(folder / "whole"))
    assert code == 0, said
    length = time.monotonic() - began
    rng = random.Random(seed)
    for number in range(kills):
        out = folder / f"killed{number}"
        process = started(out)
        time.sleep(rng.uniform(0.1, 0.95) * length)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole(out)
        code, said = ended(started(out, *(["--resume"] if out.exists() else [])))
        assert code == 0, said
        assert Plan.load(out / "plan.json") == Plan.load(folder / "whole" / "plan.json")
        first, second = (safetensors.torch.load_file(one / "model.safetensors") for one in (out, folder / "whole"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert {path.name for path in out.iterdir()} == {path.name for path in (folder / "whole").iterdir()}
        assert not [path for path in out.rglob("*") if path.name.endswith(".partial") or path.name == ".secateurs"]
        print(f"kill {number}: same plan and weights")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_killed_runs_end_with_the_same_plan_and_weights(tmp_path):
    _kill_and_resume(tmp_path, 20, seed=0)
