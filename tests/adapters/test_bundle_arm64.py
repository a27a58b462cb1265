"""A bundle on another architecture: the arm64 Python and onnxruntime of a small system that is unpacked here, under an emulator.

Correctness and memory only: how long an emulator takes says nothing. The memory figures hold the emulator's own translation of the code.
"""

import json
import platform
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import typer
from kits import QUICK, copy, made_of
from typer.testing import CliRunner

from secateurs_adapters.commands import validate

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(platform.system() != "Linux", reason="qemu's user emulation needs Linux"),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is arm64: test_bundle.py is this test"),
]

PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libstdc++6", "libgcc-s1"),
    *("zlib1g", "libexpat1", "libffi8", "liblzma5", "libbz2-1.0", "libssl3"),
)
WHEELS = ("onnxruntime==1.22.1", "numpy<2.4")
"""Newer onnxruntimes for arm64 crash at their import in qemu 7.2, which knows fewer instructions than they ask for."""
EMULATOR = "qemu-aarch64-static"


def had(command, folder, what):
    """Run a command that fetches something; skip where it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{what} cannot be had here: {error}")
    if done.returncode != 0:
        pytest.skip(f"{what} cannot be had here: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def apt(folder):
    """Return an apt-get with lists of its own, which also knows arm64 and leaves this system's as they are."""
    for part in ("lists/partial", "cache/archives/partial", "state"):
        (folder / "apt" / part).mkdir(parents=True)
    status = folder / "apt" / "status"
    status.write_text("")
    places = {"State": "state", "State::Lists": "lists", "Cache": "cache", "State::status": "status"}
    options = [f"Dir::{name}={folder / 'apt' / place}" for name, place in places.items()]
    options += ["APT::Sandbox::User=root", "APT::Architectures::=arm64", f"APT::Architectures::={host()}"]
    return ["apt-get", "-q", *(f"-o{option}" for option in options)]


def host():
    return {"x86_64": "amd64", "i686": "i386"}.get(platform.machine(), platform.machine())


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Return a function that runs Python with onnxruntime and numpy on an emulated arm64 processor."""
    folder = tmp_path_factory.mktemp("arm64")
    command = apt(folder)
    had([*command, "update"], folder, "lists of arm64 packages")
    had([*command, "download", *(f"{name}:arm64" for name in PACKAGES)], folder, "the arm64 Python of Debian 12")
    emulator = shutil.which(EMULATOR)
    if emulator is None:
        had([*command, "download", f"qemu-user-static:{host()}"], folder, EMULATOR)
        emulator = folder / "emulator" / "usr" / "bin" / EMULATOR
    system, site = folder / "system", folder / "site"
    for package in folder.glob("*.deb"):
        where = folder / "emulator" if package.name.startswith("qemu") else system
        had(["dpkg", "-x", package, where], folder, "dpkg")
    wanted = [
        "--platform",
        "manylinux_2_28_aarch64",
        "--platform",
        "manylinux_2_27_aarch64",
        "--python-version",
        "3.11",
    ]
    wheels = ["--only-binary=:all:", "--no-deps", "-d", "wheels", *wanted, *WHEELS]
    had([shutil.which("python3") or "python3", "-m", "pip", "download", "-q", *wheels], folder, "arm64 wheels")
    for wheel in (folder / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    libraries = [system / part / "lib" / "aarch64-linux-gnu" for part in ("", "usr")]
    variables = {"PYTHONHOME": system / "usr", "PYTHONPATH": site, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    given = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
    start = [emulator, "-L", system, *given, system / "usr" / "bin" / "python3.11"]

    def run(*arguments):
        command = [str(part) for part in (*start, *arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)

    assert run("-c", "import platform; print(platform.machine())").stdout.strip() == "aarch64"
    return run


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return made_of(tmp_path_factory.mktemp("bundle"))


def test_a_bundle_measures_on_another_architecture(emulated, kit, tmp_path):
    done = emulated(kit / "measure.py", *QUICK)
    assert done.returncode == 0, done.stderr
    result = json.loads((kit / "result.json").read_text())
    assert result["environment"]["machine"] == "aarch64"
    assert result["environment"]["onnxruntime"] == "1.22.1"
    for side in ("baseline", "candidate"):
        assert result["correctness"][side]["max_rel"] < 1e-5
        assert result["memory"][side][0]["anonymous"] > 2**20
    assert result["accuracy"]["baseline_right"] == result["accuracy"]["n"] == 37
    limits = tmp_path / "budget.yaml"
    limits.write_text("{accuracy_drop: 0.5, peak_memory_mib: 500, artifact_ratio: 1.5}")
    app = typer.Typer()
    app.command()(validate)
    judged = CliRunner().invoke(app, ["--measured", str(kit / "result.json"), "--budget", str(limits), "--json"])
    assert judged.exit_code == 0, judged.output
    report = json.loads(judged.stdout)
    assert report["verdict"] == "pass"
    assert {row["status"] for row in report["budget"]} == {"pass"}


@pytest.mark.parametrize("name", ["model.data", "inputs.npz"])
def test_a_tampered_file_is_refused_on_another_architecture(emulated, kit, tmp_path, name):
    damaged = copy(kit, tmp_path / "kit")
    (damaged / "result.json").unlink(missing_ok=True)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    Path(damaged / name).write_bytes(bytes(content))
    done = emulated(damaged / "measure.py", *QUICK)
    assert done.returncode == 2
    assert f"{name} was changed" in done.stderr
    assert not (damaged / "result.json").exists()
