"""The only door to onnxruntime, free of torch: guarded providers, sessions and their inputs.

onnxruntime falls back to the CPU with no more than a warning when a provider cannot be had. Here a provider that is
not available is refused before a session is built, and a session reports which providers its nodes were really
assigned to.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from secateurs.errors import DataError, ProviderError, last_line, unknown_name
from secateurs_adapters.one_node import ONE_NODE
from secateurs_adapters.signature import Signature, TensorSpec, cast, seeded_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "CPU",
    "HOST_PROVIDERS",
    "Session",
    "SessionOptions",
    "TensorSpec",
    "check_options",
    "check_provider",
    "onnxruntime_version",
    "run_dataset",
    "seeded_inputs",
]

Array = npt.NDArray[Any]

CPU = "CPUExecutionProvider"

_GPU_WHEEL = "onnxruntime-gpu (the extra `onnx-gpu`; it replaces onnxruntime)"
_WHEELS = {
    "CUDAExecutionProvider": _GPU_WHEEL,
    "TensorrtExecutionProvider": _GPU_WHEEL,
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "DmlExecutionProvider": "onnxruntime-directml",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "CANNExecutionProvider": "onnxruntime-cann",
    "CoreMLExecutionProvider": "onnxruntime on macOS",
}
_DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "CANNExecutionProvider": "cann",
}
HOST_PROVIDERS = (
    CPU,
    "XnnpackExecutionProvider",
    "DnnlExecutionProvider",
    "ACLExecutionProvider",
    "AzureExecutionProvider",
)
"""Execution providers that keep their tensors in the process's own memory."""
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
} | {
    f"tensor({name})": np.dtype(name).type
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}


@dataclass(frozen=True)
class SessionOptions:
    """How a session is built; always sequential, one inter-op thread, and no spinning threads.

    Attributes:
        provider: execution provider.
        threads: intra-op threads.
        provider_options: passed to the provider.
        memory_pattern: plan the arena from the second run on (onnxruntime's default; it about doubles what the arena
            holds).
        memory_arena: allocate CPU tensors from an arena (onnxruntime's default).
        profile: prefix of the profile that the session writes; None profiles nothing.
        record_assignment: remember which provider each node was assigned to.
        optimise: rewrite the graph for the provider (onnxruntime's default); off for a graph that was rewritten before.
        optimised: where to write the graph as the session really runs it; it fits this provider on this machine only.
        dimensions: sizes of symbolic dimensions.
        prepack: rearrange constant weights when the session is built (onnxruntime's default).
    """

    provider: str = CPU
    threads: int = 1
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    memory_pattern: bool = True
    memory_arena: bool = True
    profile: Path | None = None
    record_assignment: bool = False
    optimise: bool = True
    optimised: Path | None = None
    dimensions: Mapping[str, int] = field(default_factory=dict)
    prepack: bool = True


def check_provider(name: str) -> None:
    """Refuse an execution provider that cannot be had here.

    Raises:
        ProviderError: the name is unknown, or this onnxruntime was built without the provider.
    """
    available = onnxruntime.get_available_providers()
    if name in available:
        return
    known = onnxruntime.get_all_providers()
    if name not in known:
        short = name.lower().removesuffix("executionprovider")
        meant = [full for full in known if full.lower() == f"{short}executionprovider"]
        if meant:
            raise ProviderError(f"unknown execution provider {name!r}. Did you mean {meant[0]!r}?")
        raise ProviderError(unknown_name("execution provider", name, known))
    wheel = _WHEELS.get(name, "an onnxruntime that was built with it")
    raise ProviderError(
        f"execution provider {name!r} is not available here. Available: {', '.join(available)}. To use it, install "
        f"{wheel}."
    )


def check_options(provider: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a provider does not know, by starting it with them on a graph of one node.

    Raises:
        ProviderError: the provider takes no options, does not know one of these, or cannot start with them.
    """
    if not options:
        return
    if provider == CPU:
        raise ProviderError(f"{CPU} takes no `options`, got {', '.join(options)}; threads are set by `threads`.")
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        path = Path(folder) / "one.onnx"
        path.write_bytes(ONE_NODE)
        Session(path, SessionOptions(provider=provider, provider_options=options))


def onnxruntime_version() -> str:
    """Return the version of the onnxruntime that runs here."""
    return str(onnxruntime.__version__)


class Session:
    """One ONNX file, loaded on one execution provider.

    Args:
        path: the main file.
        options: how to build the session.

    Raises:
        ProviderError: the provider is not available, or refuses the file.
        DataError: the file is missing, or onnxruntime cannot load it.
    """

    def __init__(self, path: Path, options: SessionOptions | None = None) -> None:
        self.path = path
        self.options = options or SessionOptions()
        check_provider(self.options.provider)
        if not path.is_file():
            raise DataError(f"the ONNX file {str(path)!r} is missing; give a file that exists.")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                _native_options(self.options),
                providers=[(self.options.provider, dict(self.options.provider_options))],
                enable_fallback=0,
            )
        except Exception as error:  # onnxruntime's exceptions have no common base class
            kind = DataError if self.options.provider == CPU else ProviderError
            raise kind(
                f"onnxruntime cannot load {str(path)!r} on {self.options.provider}: {last_line(error)}"
            ) from None
        if self.options.provider not in self._session.get_providers():
            raise ProviderError(
                f"onnxruntime could not start {self.options.provider} with the options {dict(self.options.provider_options)}, and would "
                "have run on the CPU instead; check its `options` and its drivers."
            )
        self.inputs = tuple(_spec(value, path) for value in self._session.get_inputs())
        self.signature = Signature(self.inputs, path.name)
        self.outputs = tuple(str(value.name) for value in self._session.get_outputs())

    def provider_obtained(self) -> str:
        """Return the provider that runs most nodes; without a recorded assignment, the first that was registered."""
        nodes = self.nodes_per_provider()
        return max(nodes, key=lambda name: nodes[name]) if nodes else str(self._session.get_providers()[0])

    def nodes_per_provider(self) -> dict[str, int] | None:
        """Return how many nodes of the optimised graph each provider runs, or None if it was not recorded."""
        if not self.options.record_assignment or not hasattr(self._session, "get_provider_graph_assignment_info"):
            return None
        counts: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        return counts

    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Return element type and shape of every graph output, as onnxruntime infers them.

        Raises:
            DataError: an output is not a tensor of numbers.
        """
        return tuple(_spec(value, self.path, "output") for value in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return every output by name.

        Raises:
            DataError: onnxruntime refuses the inputs, or fails on them.
        """
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            shapes = {name: tuple(array.shape) for name, array in feeds.items()}
            raise DataError(f"{self.path.name!r} fails on inputs of shape {shapes}: {last_line(error)}") from None
        return dict(zip(self.outputs, values, strict=True))

    def bind(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Place inputs and outputs on the provider's device once, and return a function that runs the session on them.

        Args:
            feeds: inputs, as the graph asks for them.
            outputs: what one run on `feeds` gave, for its shapes.
        """
        device = _DEVICES.get(self.options.provider, "cpu")
        make = onnxruntime.OrtValue
        binding = self._session.io_binding()
        types = {value.name: _DTYPES.get(value.type) for value in self._session.get_outputs()}
        held = {name: make.ortvalue_from_numpy(array, device, 0) for name, array in feeds.items()}
        room = {
            name: make.ortvalue_from_shape_and_type(list(a.shape), a.dtype.type, device, 0)
            for name, a in outputs.items()
            if isinstance(a, np.ndarray) and types[name] is a.dtype.type
        }
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            if name in room:
                binding.bind_ortvalue_output(name, room[name])
            else:  # text, 8-bit floats and what is no tensor are allocated by onnxruntime at every run
                binding.bind_output(name)

        def run(_alive: object = (feeds, held, room)) -> None:
            self._session.run_with_iobinding(binding)
            if device != "cpu":
                binding.synchronize_outputs()

        return run

    def end_profiling(self) -> list[dict[str, Any]]:
        """Stop profiling and return the figures of every node that ran, in order.

        These are `duration_us`, a number, and what onnxruntime says, as text: `provider`, `output_size`, `mem_in_use_peak` and others.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return [
            event["args"] | {"duration_us": event.get("dur", 0)}
            for event in events
            if event.get("cat") == "Node" and "output_size" in event.get("args", {})
        ]

    def feeds(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs that the graph has, in its element types; others are left out.

        Raises:
            DataError: an input is missing, has another shape, or cannot be cast without loss of meaning.
        """
        missing = [spec.name for spec in self.inputs if spec.name not in inputs]
        if missing:
            raise DataError(
                f"{self.path.name!r} needs the inputs {[spec.name for spec in self.inputs]}, but the data has "
                f"{sorted(inputs)}; rename the arrays so that {missing} are among them."
            )
        return {
            spec.name: cast(spec, np.asarray(inputs[spec.name]), self.path.name, self.signature.batch_axis(spec.shape))
            for spec in self.inputs
        }

    def fixed_batch(self) -> int | None:
        """Return the batch size that the file fixes, or None where that axis is free."""
        return self.signature.fixed_batch()

    def example_axes(self) -> dict[str, int | None]:
        """Return for every output the axis that holds the examples, as far as its shape tells."""
        shapes = {str(value.name): tuple(value.shape or ()) for value in self._session.get_outputs()}
        return {name: self.signature.batch_axis(shape) for name, shape in shapes.items()}

    def examples_first(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Return the outputs that are arrays, each with its examples on the first axis where the file has them on another."""
        axes = self.example_axes()
        arrays = {name: value for name, value in outputs.items() if isinstance(value, np.ndarray)}
        return {
            name: np.moveaxis(value, axis, 0) if (axis := axes[name]) and axis < value.ndim else value
            for name, value in arrays.items()
        }


def seeded_inputs(session: Session, batch_size: int, seed: int = 0, length: int | None = None) -> dict[str, Array]:
    """Make inputs from a session's signature; see `secateurs_adapters.signature.seeded_arrays`."""
    return seeded_arrays(session.signature, batch_size, seed, length)


def run_dataset(session: Session, inputs: Mapping[str, Array], batch_size: int) -> dict[str, Array]:
    """Run every example through a session; return the outputs with the examples on their first axis, in graph order.

    A file that fixes its batch size is run at that size; the last batch is filled up by repeating its last example.

    Args:
        session: the file.
        inputs: arrays with the examples on the first axis.
        batch_size: examples per run.

    Raises:
        DataError: the inputs do not fit the graph, or its first output does not have the examples on an axis of their own.
    """
    total = len(next(iter(inputs.values()))) if inputs else 0
    fixed = session.fixed_batch()
    size = fixed or batch_size
    parts: dict[str, list[Array]] = {name: [] for name in session.outputs}
    for start in range(0, total, size):
        rows = np.arange(start, start + size if fixed else min(start + size, total)).clip(max=total - 1)
        given = session.feeds({key: array[rows] for key, array in inputs.items()})
        for name, value in session.examples_first(session.run(given)).items():
            if value.ndim and len(value) == len(rows):
                parts[name].append(value[: total - start])
            elif name == session.outputs[0]:
                raise DataError(
                    f"the first output {name!r} of {session.path.name!r} has shape {value.shape} for {len(rows)} "
                    "examples; it needs the examples on its first axis."
                )
    return {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays and sum(map(len, arrays)) == total}


def _native_options(options: SessionOptions) -> Any:
    native = onnxruntime.SessionOptions()
    native.intra_op_num_threads = options.threads
    native.inter_op_num_threads = 1
    native.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    native.enable_mem_pattern = options.memory_pattern
    native.enable_cpu_mem_arena = options.memory_arena
    native.log_severity_level = (
        4  # errors are raised, and a fallback is reported from the assignment, not from log lines
    )
    native.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if options.record_assignment:
        native.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not options.optimise:
        native.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not options.prepack:
        native.add_session_config_entry("session.disable_prepacking", "1")
    if options.optimised is not None:
        native.optimized_model_filepath = str(options.optimised)
    for name, size in options.dimensions.items():
        native.add_free_dimension_override_by_name(name, size)
    if options.profile is not None:
        native.enable_profiling = True
        native.profile_file_prefix = str(options.profile)
    return native


def _spec(value: Any, path: Path, kind: str = "input") -> TensorSpec:
    if value.type not in _DTYPES:
        allowed = ", ".join(sorted(_DTYPES))
        raise DataError(
            f"{kind} {value.name!r} of {path.name!r} is {value.type}; allowed are {allowed}. Export it with another "
            f"{kind} type."
        )
    return TensorSpec(str(value.name), np.dtype(_DTYPES[value.type]), tuple(value.shape))
