"""Bundles: the script runs where there is nothing but onnxruntime and numpy, and only what it measured is believed."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
import foreign
from kits import QUICK, bare, copy, made_of, make, measure

from secateurs.data import Dataset, resolve_roles
from secateurs.errors import DataError
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.bundle import write_bundle
from secateurs_adapters.bundle_command import bundle
from secateurs_adapters.commands import validate


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A bundle and its result, measured by an interpreter that sees only onnxruntime and numpy."""
    folder = tmp_path_factory.mktemp("bundle")
    made = made_of(folder)
    done = measure(made, bare(folder / "site"), *QUICK)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("validate")(validate)
    app.command("bundle")(bundle)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_nothing_but_onnxruntime_and_numpy_is_seen(tmp_path):
    code = "import onnxruntime, numpy, importlib.util as u; print([n for n in ('torch', 'onnx', 'pydantic') if u.find_spec(n)])"
    environment = {"PYTHONPATH": str(bare(tmp_path / "site"))}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_result_becomes_a_verdict(kit, tmp_path, run):
    limits = tmp_path / "budget.yaml"
    limits.write_text("{accuracy_drop: 0.5, latency_ms: 1000, peak_memory_mib: 100, artifact_ratio: 1.5}")
    junit = tmp_path / "junit.xml"
    done = run("validate", "--measured", kit / "result.json", "--budget", limits, "--json", "--junit", junit)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    figures = report["candidate"]["targets"][0]
    result = json.loads((kit / "result.json").read_text())
    samples = [value for process in result["latency"] for value in process["candidate"]["samples_ms"]]
    assert figures["latency_ms"]["p50"] == pytest.approx(np.median(samples))
    assert figures["latency_ms"]["n"] == len(samples) == 5 * 2 * 4
    assert (figures["batch_size"], figures["threads"]) == (4, 2)  # as the run, which the command line left open
    assert not any("made for" in note for note in report["notes"])
    assert figures["nodes_per_provider"].keys() == figures["time_per_provider"].keys() == {"CPUExecutionProvider"}
    assert figures["peak_memory_bytes"] >= 0
    assert report["baseline"]["accuracy"]["value"] == 1.0
    assert report["candidate"]["accuracy"]["n"] == 37
    assert report["environment"]["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert {row["name"]: row["status"] for row in report["budget"]} == dict.fromkeys(
        ("artifact_ratio", "accuracy_drop", "latency_ms", "peak_memory_mib"), "pass"
    )
    assert junit.read_text().count("<testcase") == 4


def test_the_files_may_be_given_and_must_be_those_that_were_measured(kit, tmp_path, run):
    files = [kit / "baseline.onnx", kit / "model.onnx"]
    assert run("validate", *files, "--measured", kit / "result.json").exit_code == 0
    swapped = run("validate", *files[::-1], "--measured", kit / "result.json")
    assert swapped.exception.exit_code == 2
    assert "is not the baseline that was measured" in str(swapped.exception)
    away = tmp_path / "result.json"
    away.write_bytes((kit / "result.json").read_bytes())
    assert run("validate", *files, "--measured", away).exit_code == 0
    assert "no manifest.json beside" in str(run("validate", "--measured", away).exception)
    assert "give both" in str(run("validate", files[0], "--measured", away).exception)
    assert "give BASELINE.onnx" in str(run("validate").exception)


def test_a_device_that_measured_otherwise_than_the_run_is_noted(kit, tmp_path, run):
    other = copy(kit, tmp_path / "kit")
    result = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(json.dumps({**result, "threads": 1}))
    notes = json.loads(run("validate", "--measured", other / "result.json", "--json").stdout)["notes"]
    said = "though the bundle was made for 2; `python measure.py` without `--threads` takes that"
    assert f"threads: 1 on the device, {said}" in notes


@pytest.mark.parametrize("missing", ["numpy", "onnxruntime"])
def test_a_device_without_a_package_is_told_what_to_install(kit, tmp_path, missing):
    site = bare(tmp_path / "site")
    (site / missing).unlink()
    done = measure(kit, site, "--output", str(tmp_path / "result.json"))
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not installed here; pip install 'onnxruntime>=1.22' numpy.\n"


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "inputs.npz", "reference_baseline.npz", "measure.py"])
def test_a_tampered_file_is_refused_on_the_device(kit, tmp_path, name):
    damaged = copy(kit, tmp_path / "kit")
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    if name == "measure.py":
        content = bytearray((damaged / name).read_bytes()) + b"# more\n"
    (damaged / name).write_bytes(bytes(content))
    (damaged / "result.json").unlink()
    done = measure(damaged, bare(tmp_path / "site"), *QUICK)
    assert done.returncode == 2
    assert f"{name} was changed" in done.stderr
    assert not (damaged / "result.json").exists()


def test_a_missing_file_and_a_missing_provider_are_refused_on_the_device(kit, tmp_path):
    damaged, site = copy(kit, tmp_path / "kit"), bare(tmp_path / "site")
    done = measure(damaged, site, "--provider", "CUDAExecutionProvider")
    assert done.returncode == 2
    assert "not available here; available: " in done.stderr
    (damaged / "labels.npy").unlink()
    assert "labels.npy is missing" in measure(damaged, site).stderr


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "manifest.json"])
def test_files_that_changed_after_the_measurement_are_refused(kit, tmp_path, run, name):
    damaged = copy(kit, tmp_path / "kit")
    if name == "manifest.json":
        (damaged / name).write_text((damaged / name).read_text() + " ")
    elif name == "model.onnx":
        model = onnx.load(str(damaged / name), load_external_data=False)
        model.doc_string = "another"
        onnx.save(model, str(damaged / name))
    else:
        with (damaged / name).open("r+b") as stream:
            stream.seek(-3, 2)
            stream.write(b"\x00\x01\x02")
    done = run("validate", "--measured", damaged / "result.json")
    assert done.exception.exit_code == 2
    assert ("another bundle" if name == "manifest.json" else "not the candidate that was measured") in str(
        done.exception
    )


def test_wrong_outputs_on_the_device_fail_the_verdict(kit, tmp_path, run):
    """References of another network stand for a device that computes something else."""
    other = copy(kit, tmp_path / "kit")
    with np.load(other / "reference_candidate.npz") as archive:
        np.savez(other / "reference_candidate.npz", o0=archive["o0"] * 1.01)
    manifest = json.loads((other / "manifest.json").read_text())
    import hashlib

    digest = hashlib.sha256((other / "reference_candidate.npz").read_bytes()).hexdigest()
    manifest["files"]["reference_candidate.npz"]["sha256"] = digest
    (other / "manifest.json").write_text(json.dumps(manifest))
    done = measure(other, bare(tmp_path / "site"), *QUICK)
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    judged = run("validate", "--measured", other / "result.json", "--json")
    assert judged.exit_code == 1
    reasons = json.loads(judged.stdout)["reasons"]
    assert len(reasons) == 1
    assert "the candidate's outputs on the device differ from those recorded by 0.009" in reasons[0]


def edit(**changes):
    def apply(result):
        for path, value in changes.items():
            *parents, last = path.split("__")
            owner = result
            for part in parents:
                owner = owner[int(part[1:])] if part.startswith("n") and part[1:].isdigit() else owner[part]
            owner[last] = value
        return json.dumps(result)

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda _: "", "EOF", id="empty"),
        pytest.param(lambda _: "{" * 100_000, "", id="nested"),
        pytest.param(lambda _: "[" * 100_000, "", id="nested lists"),
        pytest.param(lambda _: b"\xff\xfe\x00", "", id="not text"),
        pytest.param(lambda _: "null", "", id="null"),
        pytest.param(lambda _: "[]", "", id="list"),
        pytest.param(edit(schema_version=2), "schema_version", id="version"),
        pytest.param(edit(more=1), "more", id="extra key"),
        pytest.param(edit(provider="CPU[/]; rm"), "provider", id="markup"),
        pytest.param(edit(threads=True), "threads", id="bool for a number"),
        pytest.param(edit(threads=10**30), "threads", id="huge number"),
        pytest.param(edit(latency=[]), "latency", id="no processes"),
        pytest.param(edit(latency__n0__candidate__samples_ms=[0.0, 1.0]), "samples_ms", id="no time"),
        pytest.param(edit(latency__n0__candidate__samples_ms=[-1.0, 1.0]), "samples_ms", id="negative time"),
        pytest.param(edit(latency__n0__candidate__samples_ms=[float("nan")] * 3), "samples_ms", id="NaN"),
        pytest.param(edit(latency__n0__candidate__session_ms=float("inf")), "session_ms", id="infinite"),
        pytest.param(edit(latency__n0__candidate__samples_ms=["1"] * 3), "samples_ms", id="text for a number"),
        pytest.param(edit(memory__base=[]), "memory.base", id="no base"),
        pytest.param(edit(memory__base__n0__anonymous=-1), "anonymous", id="negative memory"),
        pytest.param(edit(accuracy__candidate_right=38), "add up", id="more right than examples"),
        pytest.param(edit(accuracy__lost=30, accuracy__gained=30), "more answers", id="losses that do not add up"),
        pytest.param(edit(accuracy=None), "labels", id="no accuracy"),
        pytest.param(edit(batch_size=1), "batch size", id="another batch size"),
        pytest.param(edit(placement={}), "placement", id="no placement"),
        pytest.param(edit(environment={"cpu": "\x1b[31m"}), "environment", id="terminal codes"),
        pytest.param(edit(manifest_sha256="0" * 64), "another bundle", id="another bundle"),
        pytest.param(edit(manifest_sha256="../../x"), "manifest_sha256", id="no hash"),
    ],
)
def test_a_malformed_result_is_refused(kit, tmp_path, run, damage, said):
    copied = copy(kit, tmp_path / "kit")
    content = damage(json.loads((kit / "result.json").read_text()))
    (copied / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run("validate", "--measured", copied / "result.json")
    assert getattr(done.exception, "exit_code", None) == 2, (done.exception, done.output)
    assert said in str(done.exception)
    assert len(str(done.exception)) < 1000


def test_a_result_that_is_not_there_or_too_large_is_refused(tmp_path, run):
    assert "cannot read" in str(run("validate", "--measured", tmp_path / "none.json").exception)
    assert run("validate", "--measured", tmp_path).exception.exit_code == 2
    with (tmp_path / "big.json").open("wb") as stream:
        stream.truncate(2**27)
    assert "at most" in str(run("validate", "--measured", tmp_path / "big.json").exception)


def test_the_command_bundles_other_data_or_seeded_inputs(tmp_path, run):
    make(tmp_path / "out")
    done = run(
        "bundle",
        tmp_path / "out",
        "--output",
        tmp_path / "kit",
        "--data",
        tmp_path / "out" / "data.npz",
        "--samples",
        20,
    )
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "kit" / "manifest.json").read_text())
    assert (manifest["examples"], manifest["labels"]) == (20, "labels.npy")
    assert {"model.onnx", "model.data", "baseline.onnx", "measure.py", "base.onnx"} <= set(manifest["files"])
    assert run("bundle", tmp_path / "out", "--output", tmp_path / "seeded", "--seeded").exit_code == 0
    assert json.loads((tmp_path / "seeded" / "manifest.json").read_text())["labels"] is None
    again = run("bundle", tmp_path / "out", "--output", tmp_path / "kit", "--seeded")
    assert "has content" in str(again.exception)
    (tmp_path / "out" / "recipe.yaml").write_text("no: recipe")  # neither way needs one
    foreign = run("bundle", tmp_path / "out", "--output", tmp_path / "foreign", "--seeded")
    assert foreign.exit_code == 0
    assert "made for one thread of the CPU" in foreign.stderr
    assert run("bundle", tmp_path / "none", "--output", tmp_path / "x", "--seeded").exception.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "kit", "out", "seeded"]


@pytest.mark.parametrize(("metric", "labels"), [("f1-macro", None), ("accuracy", "labels.npy")])
def test_labels_travel_only_for_the_metric_that_a_device_knows(tmp_path, run, metric, labels):
    make(tmp_path / "out")
    body = {
        "model": {"factory": "net:build"},
        "data": {"calibration": {"source": "digits"}},
        "metric": metric,
        "passes": ["magnitude"],
    }
    (tmp_path / "out" / "recipe.yaml").write_text(json.dumps(body))
    given = ("--data", tmp_path / "out" / "data.npz", "--samples", 8)
    done = run("bundle", tmp_path / "out", "--output", tmp_path / "kit", *given)
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads((tmp_path / "kit" / "manifest.json").read_text())["labels"] == labels
    assert ("the run's metric is 'f1-macro'" in done.stderr) == (labels is None)


def test_an_example_travels_once(tmp_path, run):
    data = make(tmp_path / "out").take([3, 1, 3, 3, 1, 0])
    np.savez(tmp_path / "twice.npz", **data.inputs, labels=data.labels)
    done = run("bundle", tmp_path / "out", "--output", tmp_path / "kit", "--data", tmp_path / "twice.npz")
    assert "only 3 of 6 examples are distinct" in done.stderr
    assert np.load(tmp_path / "kit" / "labels.npy").tolist() == data.labels[[0, 1, 5]].tolist()
    with np.load(tmp_path / "kit" / "inputs.npz") as archive:
        assert np.array_equal(archive["i0"][:, 0], data.inputs["x"][[0, 1, 5]])


def test_right_answers_of_a_device_are_no_other_metric(kit, tmp_path, run):
    folder = copy(kit, tmp_path / "kit")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("metric: f1-macro\nbudget: {accuracy_drop: 0.5}\n")
    asked = ("validate", "--measured", folder / "result.json", "--budget", recipe)
    assert "a device only counts right answers" in str(run(*asked).exception)
    done = run(*asked, "--metric", "accuracy", "--json")
    assert json.loads(done.stdout)["baseline"]["targets"][0]["accuracy"]["metric"] == "accuracy", done.output


def test_the_runs_own_examples_are_those_of_its_verdict(tmp_path, run):
    data = make(tmp_path / "out")
    role = {"source": "npz", "file": str(tmp_path / "out" / "data.npz"), "inputs": ["x"]}
    body = {
        "seed": 3,
        "model": {"factory": "net:build"},
        "data": {"calibration": {"source": "digits"}, "evaluation": {**role, "samples": 9}},
        "passes": ["magnitude"],
    }
    (tmp_path / "out" / "recipe.yaml").write_text(json.dumps({**body, "targets": [{"threads": 3}, {"threads": 2}]}))
    done = run("bundle", tmp_path / "out", "--output", tmp_path / "kit")
    assert done.exit_code == 0, (done.output, done.exception)
    manifest = json.loads((tmp_path / "kit" / "manifest.json").read_text())
    assert (manifest["provider"], manifest["threads"]) == ("CPUExecutionProvider", 3)
    assert "on CPUExecutionProvider with 3 threads;" in (tmp_path / "kit" / "README.txt").read_text()
    other = Dataset({"x": data.inputs["x"] + 1}, data.labels)
    judged = resolve_roles({"calibration": other, "evaluation": data}, {"evaluation": 9}, 3, cut=()).evaluation
    with np.load(tmp_path / "kit" / "inputs.npz") as archive:
        assert np.array_equal(archive["i0"][:, 0], judged.inputs["x"])  # one run per example
    assert np.array_equal(np.load(tmp_path / "kit" / "labels.npy"), judged.labels)


def test_the_variants_with_fixed_shapes_are_bundled_when_asked_for(tmp_path, run):
    make(tmp_path / "out")
    refused = run("bundle", tmp_path / "out", "--output", tmp_path / "kit", "--seeded", "--edge")
    assert "holds no variants with fixed shapes" in str(refused.exception)
    for name in ("baseline.edge.onnx", "model.edge.onnx"):
        foreign.image(tmp_path / "out" / name, 17, shape=(2, 3, 10, 10))
    assert run("bundle", tmp_path / "out", "--output", tmp_path / "kit", "--seeded", "--edge").exit_code == 0
    manifest = json.loads((tmp_path / "kit" / "manifest.json").read_text())
    assert manifest["models"] == {"baseline": "baseline.edge.onnx", "candidate": "model.edge.onnx"}
    assert manifest["batch_size"] == 2
    foreign.image(tmp_path / "out" / "baseline.edge.onnx", 17, shape=(2, 3, 12, 12))
    wrong = run(
        "bundle", tmp_path / "out", "--output", tmp_path / "x", "--data", tmp_path / "out" / "data.npz", "--edge"
    )
    assert "`--seeded` makes inputs of the sizes that the files fix" in str(wrong.exception)
    foreign.image(tmp_path / "out" / "baseline.edge.onnx", 17, shape=(2, 3, 10, 10))
    foreign.image(tmp_path / "out" / "model.quantised.edge.onnx", 17, shape=(2, 3, 10, 10))
    run("bundle", tmp_path / "out", "--output", tmp_path / "other", "--seeded", "--edge")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    assert manifest["models"]["candidate"] == "model.quantised.edge.onnx"


@pytest.mark.parametrize("family", ["recurrent", "cached", "fixed", "classes", "data-dependent"])
def test_foreign_files_are_bundled_and_checked(tmp_path, family):
    path = foreign.FAMILIES[family](tmp_path / "m.onnx", 13)
    manifest = write_bundle(read_artifact(path), read_artifact(path), tmp_path / "kit")
    assert manifest["batch_size"] == (3 if family == "fixed" else 1)
    from secateurs_adapters import measure as script

    request = {
        "models": manifest["models"],
        "references": manifest["references"],
        "inputs": manifest["inputs"],
        "tolerance": 0.0,
        "labels": None,
        "example_axis": 0,
        "provider": "CPUExecutionProvider",
        "options": {},
        "threads": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "HERE", tmp_path / "kit")
        found = script.check_outputs(request)["correctness"]
    assert found["candidate"]["holds"]
    assert found["candidate"]["max_abs"] == 0.0
    assert list(found["candidate"]["outputs"]) == manifest["references"]["candidate"]


def test_files_with_other_inputs_cannot_be_bundled(tmp_path):
    one = read_artifact(foreign.recurrent(tmp_path / "a.onnx", 13))
    other = read_artifact(foreign.tokens(tmp_path / "b.onnx", 13))
    with pytest.raises(DataError, match="two files with the same inputs"):
        write_bundle(one, other, tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


@pytest.mark.long
def test_the_oldest_onnxruntime_measures_too(kit, tmp_path, run):
    """A virtual environment into which only onnxruntime 1.22.1 was installed, which brings numpy."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    installed = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "onnxruntime==1.22.1", "numpy"], capture_output=True, text=True
    )
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install onnxruntime 1.22.1 here: {installed.stderr.strip().splitlines()[-1]}")
    copied = copy(kit, tmp_path / "kit")
    (copied / "result.json").unlink()
    subprocess.run([str(python), "measure.py", *QUICK], cwd=copied, check=True)
    done = run("validate", "--measured", copied / "result.json", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["environment"]["versions"]["onnxruntime"] == "1.22.1"
