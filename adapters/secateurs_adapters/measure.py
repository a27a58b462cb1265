"""Measure the two models of this folder on this device and write result.json, for `secateurs validate --measured result.json`.

Needs Python 3.10, onnxruntime 1.22 and numpy, or newer; nothing else, and no network. Each figure is taken in a process of its own:

* correctness: every output on every input, against the outputs that were recorded where the folder was made;
* latency: both sessions in each of several processes, in the order A B B A, no spinning;
* memory: the peak of a process that loads and runs one model, and of one that does so with a model of one node;
* placement: how many nodes ran on which execution provider, and for how long.

    python measure.py

Provider and threads are those of the run that the folder comes from; `--provider` and `--threads` take others.

Exit code 0: measured; 1: measured, but the outputs are wrong; 2: a file of the folder was changed, an argument is wrong or a package is
missing; 3: failed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
SIDES = ("baseline", "candidate")
PACKAGES = ("onnxruntime", "numpy")
MEMORY_RUNS = 3
PLACEMENT_RUNS = 5
KIB = 1024


class RefusedError(Exception):
    """The folder or the arguments are not as they should be."""


def main() -> int:
    """Measure, and return the exit code."""
    options = arguments()
    if options.task is not None:
        print(json.dumps(TASKS[options.task](json.loads(options.request))))
        return 0
    try:
        refuse_missing()
        manifest, digest = read_manifest()
        result = measure(manifest, digest, as_asked(options, manifest))
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: the measurement failed: {error}", file=sys.stderr)
        return 3
    partial = options.output.with_name(f".{options.output.name}.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(options.output)
    right = all(result["correctness"][side]["holds"] for side in SIDES)
    print(f"{'measured' if right else 'the outputs are WRONG on this device'}; wrote {options.output}")
    return 0 if right else 1


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure the models of this folder on this device.")
    parser.add_argument("--provider", help="execution provider (that of the run)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the provider")
    parser.add_argument("--threads", type=positive, help="intra-op threads (those of the run)")
    parser.add_argument("--processes", type=positive, default=5, help="processes for latency, at least 5 (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=40, help="rounds A B B A per process (%(default)s)")
    parser.add_argument("--warmup", type=positive, default=20, help="runs before the first round (%(default)s)")
    parser.add_argument("--memory-repeats", type=positive, default=3, help="processes per model (%(default)s)")
    parser.add_argument("--timeout", type=positive, default=3600, help="seconds per process (%(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "result.json", help="where the result goes")
    parser.add_argument("--task", choices=sorted(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--request", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.processes < 5:
        parser.error("--processes: an interval needs at least 5")
    if any("=" not in pair for pair in options.option):
        parser.error("--option: takes KEY=VALUE")
    return options


def refuse_missing() -> None:
    """Refuse to work without the packages that this needs."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise RefusedError(f"{name} is not installed here; pip install 'onnxruntime>=1.22' numpy.")


def as_asked(options: argparse.Namespace, manifest: dict[str, Any]) -> argparse.Namespace:
    """Fill in what the command line leaves open: where the run measured, which the manifest says."""
    meant = manifest.get("provider", "CPUExecutionProvider")
    if options.provider in (None, meant):
        options.provider = meant
        options.option = [f"{key}={value}" for key, value in manifest.get("options", {}).items()] + options.option
    if options.threads is None:
        options.threads = manifest.get("threads", 1)
    return options


def positive(text: str) -> int:
    """Read a whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def read_manifest() -> tuple[dict[str, Any], str]:
    """Return the manifest and its hash, once every file that it lists has the content that it says."""
    try:
        content = (HERE / "manifest.json").read_bytes()
        manifest = json.loads(content)
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RefusedError("manifest.json is missing or damaged; copy the whole folder again.") from None
    for name, known in files.items():
        path = HERE / name
        if not path.is_file():
            raise RefusedError(f"{name} is missing; copy the whole folder again.")
        if file_hash(path) != known["sha256"]:
            raise RefusedError(f"{name} was changed after the folder was made; copy the whole folder again.")
    return manifest, hashlib.sha256(content).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    hashed = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def measure(manifest: dict[str, Any], digest: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run every task in processes of its own and return the result."""
    request: dict[str, Any] = {
        "models": manifest["models"],
        "references": manifest["references"],
        "inputs": manifest["inputs"],
        "tolerance": manifest["tolerance"],
        "labels": manifest["labels"],
        "examples": manifest["examples"],
        "example_axis": manifest["example_axis"],
        "provider": options.provider,
        "options": dict(pair.split("=", 1) for pair in options.option),
        "threads": options.threads,
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    start = time.time()

    def fresh(task: str, **more: Any) -> Any:
        print(f"{task} {' '.join(str(value) for value in more.values())}".rstrip(), file=sys.stderr)
        return in_fresh_process(task, {**request, **more}, options.timeout)

    about = fresh("about")
    if options.provider not in about["providers"]:
        raise RefusedError(
            f"{options.provider} is not available here; available: {', '.join(about['providers'])}; "
            "choose with --provider."
        )
    checked = fresh("correctness")
    latency = [fresh("latency", order=SIDES if n % 2 == 0 else SIDES[::-1]) for n in range(options.processes)]
    memory: dict[str, list[Any]] = {"base": [], "baseline": [], "candidate": []}
    for _ in range(options.memory_repeats):
        for what, found in memory.items():
            found.append(fresh("memory", what=what))
    return {
        "schema_version": 1,
        "manifest_sha256": digest,
        "provider": options.provider,
        "threads": options.threads,
        "batch_size": manifest["batch_size"],
        "environment": about["environment"],
        "correctness": checked["correctness"],
        "accuracy": checked["accuracy"],
        "latency": latency,
        "memory": memory,
        "placement": {side: fresh("placement", what=side) for side in SIDES},
        "seconds": round(time.time() - start, 3),
    }


def in_fresh_process(task: str, request: dict[str, Any], timeout: int) -> Any:
    """Run a task in a process that has loaded nothing yet, and return its answer.

    A fork where there is one (this process loads neither numpy nor onnxruntime), since emulators cannot start another interpreter.
    """
    if not hasattr(os, "fork"):
        command = [sys.executable, __file__, "--task", task, "--request", json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)  # noqa: S603 - this very file
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"{task} ended with {done.returncode}"])[-1])
        return json.loads(done.stdout.strip().splitlines()[-1])
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        answer_in_child(task, request, write)
    os.close(write)
    text = read_pipe(read, child, timeout)
    status = os.waitpid(child, 0)[1]
    if not text:
        raise RuntimeError(f"the process for {task} ended with status {status}, perhaps for want of memory")
    answer = json.loads(text)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["answer"]


def answer_in_child(task: str, request: dict[str, Any], write: int) -> None:
    """Run a task, send its answer through a pipe, and end this process without the parent's clean-up."""
    code = 0
    try:
        answer = {"answer": TASKS[task](request)}
    except BaseException as error:  # whatever happens, the parent is told
        lines = str(error).strip().splitlines() or [""]
        answer, code = {"error": f"{task}: {type(error).__name__}: {lines[-1]}"}, 1
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(write, data) :]
    os._exit(code)


def read_pipe(read: int, child: int, timeout: int) -> bytes:
    """Return what the child sends until it closes its end; end the child after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    parts: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise RuntimeError(f"a process took more than {timeout} s; allow more with --timeout")
        part = os.read(read, 1 << 16)
        if not part:
            os.close(read)
            return b"".join(parts)
        parts.append(part)


def session_of(path: Path, request: dict[str, Any], profile: Path | None = None) -> Any:
    """Build a session: sequential, fixed threads, no spinning."""
    import onnxruntime

    native = onnxruntime.SessionOptions()
    native.intra_op_num_threads = request["threads"]
    native.inter_op_num_threads = 1
    native.log_severity_level = 3
    native.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        native.enable_profiling = True
        native.profile_file_prefix = str(profile)
        native.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [(request["provider"], request["options"])]
    session = onnxruntime.InferenceSession(str(path), native, providers=providers)
    if request["provider"] not in session.get_providers():
        raise RuntimeError(f"{request['provider']} did not start, and the CPU would have taken its place")
    return session


def first_feed(request: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of the first run."""
    import numpy as np

    with np.load(HERE / "first.npz", allow_pickle=False) as archive:
        return {name: archive[f"i{number}"] for number, name in enumerate(request["inputs"])}


def about_here(_request: dict[str, Any]) -> dict[str, Any]:
    """Return the providers of this onnxruntime, and versions and processor."""
    import numpy as np
    import onnxruntime

    environment = {
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu": processor(),
        "cores": str(os.cpu_count()),
    }
    return {"providers": onnxruntime.get_available_providers(), "environment": environment}


def processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return names[0] if names else platform.processor()


def check_outputs(request: dict[str, Any]) -> dict[str, Any]:
    """Run all inputs through both models and compare every output with what was recorded; count right answers where there are labels."""
    import numpy as np

    with np.load(HERE / "inputs.npz", allow_pickle=False) as archive:
        inputs = {name: archive[f"i{number}"] for number, name in enumerate(request["inputs"])}
    runs = len(next(iter(inputs.values()))) if inputs else 1
    found, right = {}, {}
    for side in SIDES:
        session = session_of(HERE / request["models"][side], request)
        names = request["references"][side]
        outputs: list[list[Any]] = [[] for _ in names]
        for run in range(runs):
            feed = {name: np.asarray(array[run]) for name, array in inputs.items()}
            for kept, value in zip(outputs, session.run(names, feed), strict=True):
                kept.append(value)
        with np.load(HERE / f"reference_{side}.npz", allow_pickle=False) as archive:
            pairs = [(archive[f"o{n}"], np.stack(values)) for n, values in enumerate(outputs)]
        found[side] = compare(names, pairs, request["tolerance"])
        right[side] = answers(pairs[0][1], request)
    return {"correctness": found, "accuracy": count_right(right)}


def largest(values: Any) -> float:
    """Return the largest absolute value that is finite and fills in for no mask: all but equal values, far from the rest."""
    import numpy as np

    sizes = np.abs(values[np.isfinite(values)])
    while sizes.size:
        others = sizes[sizes < 0.999 * sizes.max()]
        if not others.size or sizes.size == others.size + 1 or others.max() * 1000 >= 0.999 * sizes.max():
            return float(sizes.max())
        sizes = others
    return 0.0


def compare(names: list[str], pairs: list[Any], tolerance: float) -> dict[str, Any]:
    """Return the largest difference of all outputs, absolute and as a share of the output's largest value."""
    import numpy as np

    worst_abs, worst, each = 0.0, 0.0, {}
    for name, (expected, got) in zip(names, pairs, strict=True):
        if expected.shape != got.shape:
            share = distance = float("inf")
        else:
            a, b = expected.astype(np.float64), got.astype(np.float64)
            differs = ~((a == b) | (np.isnan(a) & np.isnan(b)))
            distance = float(np.abs(a[differs] - b[differs]).max()) if differs.any() else 0.0
            distance = distance if np.isfinite(distance) else float("inf")
            scale = largest(a)
            share = 0.0 if distance == 0 else distance / scale if scale > 0 else float("inf")
        each[name] = finite_or_none(share)
        worst_abs, worst = max(worst_abs, distance), max(worst, share)
    return {
        "max_abs": finite_or_none(worst_abs),
        "max_rel": finite_or_none(worst),
        "outputs": each,
        "holds": worst <= tolerance,
    }


def finite_or_none(value: float) -> float | None:
    """Return the value, or None where JSON has no word for it."""
    return value if value == value and abs(value) != float("inf") else None


def answers(outputs: Any, request: dict[str, Any]) -> Any:
    """Return which examples are classified rightly; None where there are no labels."""
    import numpy as np

    if request["labels"] is None:
        return None
    labels = np.load(HERE / request["labels"], allow_pickle=False)
    scores = np.moveaxis(outputs, request["example_axis"] + 1, 1)
    chosen = np.where(np.isnan(scores).any(-1), -1, scores.argmax(-1))  # a NaN is no answer
    return (chosen.reshape(-1)[: len(labels)] == labels).tolist()


def count_right(right: dict[str, Any]) -> dict[str, int] | None:
    """Return how many answers are right, and on how many only one model's is."""
    if right["baseline"] is None:
        return None
    pairs = list(zip(right["baseline"], right["candidate"], strict=True))
    return {
        "n": len(pairs),
        "baseline_right": sum(right["baseline"]),
        "candidate_right": sum(right["candidate"]),
        "lost": sum(a and not b for a, b in pairs),
        "gained": sum(b and not a for a, b in pairs),
    }


def time_both(request: dict[str, Any]) -> dict[str, Any]:
    """Build both sessions in this process, warm them up, and time them A B B A, milliseconds."""
    feed = first_feed(request)
    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], None]] = {}
    for side in request["order"]:
        start = time.perf_counter_ns()
        session = session_of(HERE / request["models"][side], request)
        created = time.perf_counter_ns()
        session.run(None, feed)
        finished = time.perf_counter_ns()
        found[side] = {
            "session_ms": (created - start) / 1e6,
            "first_run_ms": (finished - created) / 1e6,
            "samples_ms": [],
        }
        runs[side] = bound(session, feed)
    for _ in range(request["warmup"]):
        for run in runs.values():
            run()
    first, second = request["order"]
    gc.disable()
    for _ in range(request["repeats"]):
        for side in (first, second, second, first):
            start = time.perf_counter_ns()
            runs[side]()
            found[side]["samples_ms"].append((time.perf_counter_ns() - start) / 1e6)
    return found


def bound(session: Any, feed: dict[str, Any]) -> Callable[[], None]:
    """Return a function that runs a session on inputs that lie where it reads them."""
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda _alive=feed: session.run_with_iobinding(binding)  # type: ignore[misc]


def peak_memory(request: dict[str, Any]) -> dict[str, Any]:
    """Load and run one model in this process and return the peak of its memory, bytes."""
    import numpy as np
    import onnxruntime  # noqa: F401 - its own pages belong to every figure

    base = request["what"] == "base"
    feed = {"x": np.zeros((1, 1), np.float32)} if base else first_feed(request)
    path = HERE / ("base.onnx" if base else request["models"][request["what"]])
    gc.collect()
    reason = ""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        reason = "the peak includes the imports, since the kernel does not let it be reset"
    session = session_of(path, request)
    for _ in range(MEMORY_RUNS):
        session.run(None, feed)
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        sizes = [int(fields[key].split()[0]) * KIB for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem")]
    except (OSError, KeyError):
        return {"anonymous": None, "resident": None, "reason": "this system has no /proc/self/status"}
    return {"anonymous": max(sizes[1], sizes[0] - sizes[2] - sizes[3]), "resident": sizes[0], "reason": reason}


def where_nodes_run(request: dict[str, Any]) -> dict[str, Any]:
    """Return how many nodes ran on each provider, and microseconds per provider over some runs after the first."""
    feed = first_feed(request)
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(HERE / request["models"][request["what"]], request, Path(folder) / "profile")
        for _ in range(1 + PLACEMENT_RUNS):
            session.run(None, feed)
        content = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    events = [
        e
        for e in content
        if e.get("cat") == "Node" and e.get("args", {}).get("provider") and "output_size" in e["args"]
    ]
    spent: dict[str, float] = {}
    names: dict[str, set[str]] = {}
    for event in events[len(events) // (1 + PLACEMENT_RUNS) :]:
        provider = event["args"]["provider"]
        spent[provider] = spent.get(provider, 0.0) + event["dur"]
        names.setdefault(provider, set()).add(event["name"])
    nodes = {provider: len(found) for provider, found in names.items()}
    if hasattr(session, "get_provider_graph_assignment_info"):
        nodes = {}
        for part in session.get_provider_graph_assignment_info():
            nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(part.get_nodes())
    return {"nodes": nodes, "microseconds": spent, "registered": session.get_providers()[0]}


TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "about": about_here,
    "correctness": check_outputs,
    "latency": time_both,
    "memory": peak_memory,
    "placement": where_nodes_run,
}

if __name__ == "__main__":
    sys.exit(main())
