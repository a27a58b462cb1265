"""`secateurs validate` through the command line: providers that are not there, and a provider that takes only a part."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import onnxruntime
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import foreign

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here")
def test_cuda_without_cuda_is_refused_with_what_is_there_and_what_to_install(secateurs, tmp_path):
    file = foreign.image(tmp_path / "m.onnx", 17)
    ended = secateurs("validate", file, file, "--provider", "CUDAExecutionProvider")
    assert ended.code == 2
    for part in (
        "'CUDAExecutionProvider' is not available here",
        *onnxruntime.get_available_providers(),
        "onnxruntime-gpu",
    ):
        assert part in ended.err
    assert "Traceback" not in ended.err


def test_options_that_a_provider_does_not_take_are_refused(secateurs):
    more = ["--set", "targets.0.options={arena: 1}"]
    ended = secateurs("run", "examples/quickstart.yaml", "--dry-run", *more)
    assert ended.code == 2
    assert "takes no `options`, got arena" in ended.err
    nested = secateurs("run", "examples/quickstart.yaml", "--dry-run", "--set", "targets.0.options={device: {id: 1}}")
    assert nested.code == 2
    assert "provider options are text" in nested.err


@pytest.fixture(scope="session")
def openvino(tmp_path_factory):
    """An environment whose onnxruntime has OpenVINO, and which sees everything else of this one."""
    folder = tmp_path_factory.mktemp("openvino") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    wheel = "onnxruntime-openvino==1.24.1"
    installed = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", wheel], capture_output=True, text=True
    )
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install {wheel} here: {installed.stderr.strip().splitlines()[-1]}")
    path = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    sources = [str(Path(__file__).parents[2] / part) for part in ("plugin", "adapters")]
    Path(path.stdout.strip(), "other.pth").write_text("\n".join([sysconfig.get_path("purelib"), *sources]) + "\n")
    return python


@pytest.mark.long
@pytest.mark.parametrize(
    ("operator", "allowed", "code"), [("Relu", 0.0, 0), ("Hardmax", 0.0, 1), ("Hardmax", 0.99, 0), ("Relu", 0.0, 2)]
)
def test_a_part_that_a_provider_cannot_take_fails_the_verdict(openvino, tmp_path, operator, allowed, code):
    """OpenVINO takes no Hardmax: onnxruntime runs that node on the CPU."""
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node(operator, ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    shape = ["batch", 64]
    file = foreign.save(
        tmp_path / "m.onnx",
        nodes,
        [("x", foreign.FLOAT, shape)],
        [("y", foreign.FLOAT, shape)],
        {"w": foreign.weights(64, 64)},
    )
    provider = "CUDAExecutionProvider" if code == 2 else "OpenVINOExecutionProvider"
    command = [openvino, "-m", "secateurs", "validate", file, file, "--provider", provider, "--repeats", "4", "--json"]
    done = subprocess.run(
        [str(part) for part in (*command, "--allow-elsewhere", allowed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    if code == 2:
        assert "Available: OpenVINOExecutionProvider, CPUExecutionProvider" in done.stderr
        return
    report = json.loads(done.stdout)
    figures = report["candidate"]["targets"][0]
    assert figures["activation_bytes_profiled"] is None
    assert "onnxruntime 1.24.1 does not count the arena" in figures["memory"]["reasons"]["profiled"]
    if operator == "Hardmax":
        # OpenVINO may leave a neighbour to the CPU too.
        assert set(figures["nodes_per_provider"]) == {"OpenVINOExecutionProvider", "CPUExecutionProvider"}
        assert sum(figures["nodes_per_provider"].values()) == 3
        assert 0 < figures["time_per_provider"]["CPUExecutionProvider"] < 1
        assert len(report["reasons"]) == (2 if code else 0)
    else:
        assert set(figures["nodes_per_provider"]) == {"OpenVINOExecutionProvider"}
    assert all("on CPUExecutionProvider" in reason for reason in report["reasons"])
