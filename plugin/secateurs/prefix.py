"""Forward passes that start in the middle: the part before some layers is computed once and replayed.

Trials that change only layers from some point on (one group's readers, the next layer to refit) repeat everything before it. A `Prefix` records
the outputs of the outermost modules that have finished by then and lets them answer with the recording instead of computing. What lies between
modules (additions, activations) runs as ever, so the result is the same to the last bit; that is checked on the first batch, and a network that
does not keep it (one with side effects between its layers) is simply run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.forward import call, examples_per_pass, frozen_randomness, inference, logits, output_tensors
from secateurs.layers import mixes
from secateurs.outputs import joined

__all__ = ["Prefix", "Timeline"]

LIMIT = 1 << 30
"""Bytes that a recording may take; a prefix that would need more is not recorded."""
SMALL = 64 << 20
"""Bytes of a recording that is not worth the passes that would tell which of its outputs are not read."""


class _Enough(BaseException):
    """All that a recording needs has been recorded."""


class Timeline:
    """When each module of a network runs, from one forward pass.

    Args:
        model: the network; it is not changed.
        example: inputs of the forward pass.
    """

    def __init__(self, model: nn.Module, example: Dataset) -> None:
        self.example = example
        self._began: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        names = {module: name for name, module in model.named_modules()}
        self._children = {name: _computing_children(module, names) for module, name in names.items()}
        clock = iter(range(1 << 62))
        with inference(model), ExitStack() as stack:
            for name, module in model.named_modules():

                def begin(*_: Any, name: str = name) -> None:
                    self._began.setdefault(name, next(clock))

                def end(*_: Any, name: str = name) -> None:
                    self._ended[name] = next(clock)

                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
            call(model, example)

    def finished(self, layers: Collection[str]) -> list[str]:
        """Return the outermost modules with layers that mix channels whose every call ends before any of `layers` is called."""
        starts = [self._began[name] for name in layers if name in self._began]
        found: list[str] = []

        def visit(name: str) -> None:
            if starts and self._ended.get(name, 0) and self._ended[name] < min(starts):
                found.append(name)
                return
            for child in self._children[name]:
                visit(child)

        visit("")
        return list(dict.fromkeys(found))


def _computing_children(module: nn.Module, names: Mapping[nn.Module, str]) -> list[str]:
    """Return the children that hold a layer that mixes channels; one that is shared goes by its first name."""
    return [names[child] for child in module.children() if any(mixes(part) for part in child.modules())]


class Prefix:
    """The recorded beginning of the forward pass over a data set.

    Args:
        model: the network; what is recorded must not change while the recording is used.
        data: the examples; batches are made of those of like lengths, where they are trimmed.
        before: the layers from which on the network may change.
        timeline: of the network.
        batch_size: examples per forward pass; None takes as many as `secateurs.forward.predict`.
        start: a recording that ends earlier, to go on from.
        limit: bytes that the recording may take.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        before: Collection[str],
        timeline: Timeline,
        *,
        batch_size: int | None = None,
        start: Prefix | None = None,
        limit: int = LIMIT,
    ) -> None:
        self._model = model
        self._order, self._sorted = data.by_length(), data.trims
        self.batches = list(data.take(self._order).batches(batch_size or examples_per_pass(data)))
        self._modules = {name: model.get_submodule(name) for name in timeline.finished(before)}
        self._recorded: list[dict[str, list[Any]]] = []
        self._unread: set[str] = set()
        self._unread = self._find_unread(timeline.example, set() if start is None else start._unread)
        size, calls = 0, 0
        for number, batch in enumerate(self.batches):
            if not self._modules:
                break
            recorded, output = self._record(batch, number, start, calls)
            calls = sum(map(len, recorded.values()))
            size += sum(_bytes(value) for name in recorded if name not in self._unread for value in recorded[name])
            self._recorded.append(recorded)
            if size > limit or (number == 0 and not self._exact(batch, output, recorded)):
                self._modules, self._recorded = {}, []

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are replayed; none where nothing could be recorded."""
        return tuple(self._modules)

    @contextmanager
    def replaying(self, number: int) -> Iterator[None]:
        """Replay the recording of batch `number` for the length of a block."""
        with self._playing(self._recorded[number] if self._recorded else {}):
            yield

    @contextmanager
    def _playing(self, recorded: Mapping[str, list[Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, values in recorded.items():
                module = self._modules[name]
                stack.callback(_restore_forward(module))
                module.__dict__["forward"] = _player(values)
            yield

    def predict(self) -> Tensor:
        """Return the prediction for every example, as `secateurs.forward.predict`."""
        found = []
        with inference(self._model):
            for number, batch in enumerate(self.batches):
                with self.replaying(number):
                    found.append(logits(call(self._model, batch)).detach())
        whole = joined(found)
        return whole[torch.from_numpy(self._order).argsort()] if self._sorted else whole

    def _find_unread(self, example: Dataset, known: set[str]) -> set[str]:
        """Return the modules whose outputs only other replayed modules read: a hollow value in their place changes nothing.

        Args:
            example: to replay.
            known: those of a recording that ends earlier, which still are if they answer at all; tried together, the others one by one.
        """
        if not self._modules:
            return set()
        recorded, output = self._record(example, 0, None)
        size = sum(_bytes(value) for values in recorded.values() for value in values)
        if not known and size * len(self._order) < SMALL * len(example):
            return set()
        hollow = {name: [_hollow(value) for value in values] for name, values in recorded.items()}
        hollow = {name: values for name, values in hollow.items() if all(map(_is_hollow, values))}
        unread = known & set(hollow)
        if unread and not self._exact(example, output, {**recorded, **{name: hollow[name] for name in unread}}):
            unread = set()
        others = [name for name in hollow if name not in unread]
        return unread | {name for name in others if self._exact(example, output, {**recorded, name: hollow[name]})}

    def _record(
        self, batch: Dataset, number: int, start: Prefix | None, calls: int = 0
    ) -> tuple[dict[str, list[Any]], Any]:
        """Return the outputs of the modules on a batch, and that of the network; after `calls` of them it stops, without the latter."""
        recorded: dict[str, list[Any]] = {name: [] for name in self._modules}
        with inference(self._model), ExitStack() as stack:
            for name, module in self._modules.items():

                def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    recorded[name].append(_hollow(output) if name in self._unread else _copied(output))
                    if sum(map(len, recorded.values())) == calls:
                        raise _Enough

                stack.callback(module.register_forward_hook(hook).remove)
            if start is not None:
                stack.enter_context(start.replaying(number))
            stack.enter_context(frozen_randomness(0))
            try:
                return recorded, call(self._model, batch)
            except _Enough:
                return recorded, None

    def _exact(self, batch: Dataset, output: Any, recorded: Mapping[str, list[Any]]) -> bool:
        """Tell whether replaying gives the very output that was computed."""
        try:
            with inference(self._model), self._playing(recorded), frozen_randomness(0):
                again = output_tensors(call(self._model, batch))
        except Exception:  # whatever a network does that relies on its layers' side effects
            return False
        pairs = zip(output_tensors(output), again, strict=True)
        return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


def _player(values: list[Any]) -> Callable[..., Any]:
    """Return a function that answers its calls with copies of the values, one after the other."""
    queue = iter(values)

    def play(*_: Any, **__: Any) -> Any:
        return _copied(next(queue))

    return play


def _restore_forward(module: nn.Module) -> Callable[[], None]:
    """Return what puts `module.forward` back to what it is now."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    return restore


def _copied(value: Any) -> Any:
    """Return an output with its tensors cloned, so that an operation in place does not reach the recording."""
    return _mapped(value, lambda tensor: tensor if 0 in tensor.stride() else tensor.detach().clone())


def _hollow(value: Any) -> Any:
    """Return an output of the same shapes that takes no memory: one NaN, seen everywhere."""
    return _mapped(
        value, lambda tensor: torch.full((), float("nan")).to(tensor.dtype).to(tensor.device).expand(tensor.shape)
    )


def _is_hollow(value: Any) -> bool:
    """Tell whether `_hollow` reached every tensor of an output: it knows no classes of the network's own."""
    return all(tensor.untyped_storage().nbytes() <= tensor.element_size() for tensor in output_tensors(value))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, Mapping) and hasattr(value, "__dict__"):  # a model output of transformers
        return type(value)(**{name: _mapped(item, change) for name, item in value.items()})
    return {name: _mapped(item, change) for name, item in value.items()} if type(value) is dict else value


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in output_tensors(value))
