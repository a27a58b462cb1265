"""Where a training loop runs: in one process as it is, or through Hugging Face accelerate with mixed precision and several processes.

`secateurs.recovery` writes the loop once and asks a `Loop` for the steps that differ. Several processes share each step: every one takes its
part of the examples, the gradients are summed, and all take the same step. The sum is taken here and not by `DistributedDataParallel`, because
the parts of a step may be uneven or empty and a frozen or unused parameter must stay without a gradient; so the result is that of one process.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateurs import processes
from secateurs.errors import ProviderError, RecipeError, SecateursError
from secateurs.forward import device_of
from secateurs.settings import RecoverySettings

__all__ = ["Loop", "check_loop", "open_loop", "tensors_of"]

CLIP = 1.0
"""Largest norm of all gradients together."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name; one that has several names is there once."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


class Loop:
    """One process in full precision.

    Attributes:
        rank: the number of this process.
        processes: how many share the training.
    """

    rank = 0
    processes = 1

    def parts(self, examples: int, size: int, smallest: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield this process's micro-batches of a step, as indices.

        Args:
            examples: of the step.
            size: examples per micro-batch, over all processes.
            smallest: examples that a micro-batch must have, where there are as many.
        """
        wanted = self.processes * math.ceil(examples / size)
        split = np.array_split(np.arange(examples), min(wanted, max(1, examples // smallest)))
        yield from split[self.rank :: self.processes]

    def prepare(self, optimiser: torch.optim.Optimizer) -> None:
        """Take steps with `optimiser` from here on."""
        self._optimiser: Any = optimiser

    def share(self, model: nn.Module, told: str) -> None:
        """Give every process the main one's weights; `told` says what else they must agree on."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's share of the loss."""
        loss.backward()

    def combine(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> float:  # noqa: ARG002 - one process has the sum
        """Sum gradients and loss over the processes, in place, and return the loss."""
        return float(loss)

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Clip the gradients and take a step."""
        nn.utils.clip_grad_norm_(parameters, CLIP)
        self._optimiser.step()

    def level(self, model: nn.Module) -> None:
        """Average the running statistics over the processes, in place."""

    def agree(self, value: float) -> float:
        """Return the main process's value."""
        return value

    def least(self, value: int) -> int:
        """Return the smallest value of all processes."""
        return value

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs to know of the loop, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""


class Accelerated(Loop):
    """One or several processes, in the asked precision, through `accelerate.Accelerator`.

    Args:
        accelerator: made for the settings.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank = accelerator.process_index
        self.processes = accelerator.num_processes

    def prepare(self, optimiser: torch.optim.Optimizer) -> None:
        """Take steps with `optimiser` from here on, its gradients unscaled first where float16 scales them."""
        self._optimiser = self._accelerator.prepare_optimizer(optimiser, device_placement=False)

    def share(self, model: nn.Module, told: str) -> None:
        """Give every process the main one's weights, after checking that all train the same network.

        Raises:
            SecateursError: the processes have different networks, settings or data.
        """
        if self.processes == 1:
            return
        tensors = tensors_of(model)
        described = repr([told, *((name, tuple(tensor.shape)) for name, tensor in tensors.items())])
        number = int.from_bytes(hashlib.blake2b(described.encode(), digest_size=4).digest(), "big")
        if (self.least(number), -self.least(-number)) != (number, number):
            raise SecateursError(
                f"process {self.rank} of {self.processes} does not train the same network on the same data as the others; passes that stop "
                f"at a time limit or measure latency may differ between processes. Raise their `time_limit`, or start one process."
            )
        from accelerate.utils import broadcast

        for tensor in tensors.values():
            tensor.copy_(broadcast(tensor.contiguous()))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: mixed precision, if asked for."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's share of the loss, scaled where float16 needs it."""
        self._accelerator.backward(loss)

    def combine(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> float:
        """Sum gradients and loss over the processes, in place, and return the loss; what has a gradient nowhere keeps none."""
        if self.processes == 1:
            return float(loss)
        there = [float(parameter.grad is not None) for parameter in parameters]
        total, *owners = self._sum(torch.tensor([float(loss), *there], device=loss.device)).tolist()
        alike: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter, number in zip(parameters, owners, strict=True):
            if number:
                alike[parameter.dtype].append(parameter)
        for members in alike.values():
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in members]
            flat = self._sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for member, piece in zip(members, flat.split([each.numel() for each in members]), strict=True):
                member.grad = piece.view(member.shape)
        return float(total)

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Clip the gradients and take a step; with float16, a step whose gradients overflow is left out."""
        self._accelerator.clip_grad_norm_(parameters, CLIP)
        self._optimiser.step()

    def level(self, model: nn.Module) -> None:
        """Average the running statistics over the processes, in place: each saw its own part of the data. Counters are the main one's."""
        if self.processes == 1:
            return
        from accelerate.utils import broadcast

        for buffer in model.buffers():
            averaged = self._accelerator.reduce(buffer, "mean") if buffer.is_floating_point() else broadcast(buffer)
            buffer.copy_(averaged)

    def agree(self, value: float) -> float:
        """Return the main process's value, exactly."""
        if self.processes == 1:
            return value
        number = torch.tensor([value if self.rank == 0 else 0.0], dtype=torch.float64, device=self._accelerator.device)
        return float(self._sum(number))

    def least(self, value: int) -> int:
        """Return the smallest value of all processes."""
        if self.processes == 1:
            return value
        return int(self._accelerator.gather(torch.tensor([value], device=self._accelerator.device)).min())

    def state(self) -> dict[str, Any]:
        """Return the scale of the gradients, where float16 needs one."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the scale that `state` returned."""
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(state)

    def _sum(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self._accelerator.reduce(tensor, "sum")
        return summed


def check_loop(settings: RecoverySettings, device: torch.device) -> None:
    """Check that the asked loop and precision exist here, before anything is trained.

    Raises:
        RecipeError: the loop or the precision needs accelerate, which is not installed or not asked for.
        ProviderError: the device has no arithmetic of that precision.
    """
    asked = f"`recovery.precision: {settings.precision}`"
    if settings.loop == "plain":
        if settings.precision != "no":
            raise RecipeError(
                f"{asked} needs accelerate, and `recovery.loop` is 'plain'; set `loop: auto` or `precision: \"no\"`."
            )
        return
    if not _installed() and (settings.loop == "accelerate" or settings.precision != "no"):
        wanted = asked if settings.precision != "no" else "`recovery.loop: accelerate`"
        raise RecipeError(
            f"{wanted} needs accelerate, which is not installed; pip install 'secateurs[train]', "
            f"or leave `precision` and `loop` at their defaults."
        )
    device = processes.join().device if processes.count() > 1 else device
    if settings.precision == "fp16" and device.type == "cpu":
        raise ProviderError(f"{asked} needs a GPU, and the network is on the CPU; set `precision: bf16` or `no`.")
    if settings.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name(device)
        raise ProviderError(f"{asked} is not supported by the GPU {name!r}; set `precision: fp16` or `no`.")


def _installed() -> bool:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def open_loop(settings: RecoverySettings, *models: nn.Module) -> Iterator[Loop]:
    """Yield the loop for the settings, with the models where it trains them: where they are, or, of several processes, on each one's device.

    Args:
        settings: of the training; `check_loop` has passed.
        models: the network, and what it learns from; they are put back after the block.
    """
    if settings.loop == "plain" or not (processes.count() > 1 or _installed()):
        yield Loop()
        return
    several = processes.count() > 1
    homes = [device_of(model) for model in models]
    with _accelerator(settings, homes[0], several) as accelerator:
        try:
            for model in models if several else ():
                model.to(accelerator.device)
            yield Accelerated(accelerator)
        finally:
            for model, home in zip(models, homes, strict=True) if several else ():
                model.to(home)


@contextmanager
def _accelerator(settings: RecoverySettings, device: torch.device, several: bool) -> Iterator[Any]:
    """Yield an accelerator of our own, and leave accelerate's process-wide state as it was: a caller's `Trainer` may rely on it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    if several:
        processes.join()
    states = [AcceleratorState, GradientState, *([] if several else [PartialState])]
    saved = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision,
            cpu=device.type == "cpu" and not several,
            device_placement=False,
            # Said here, or the launcher's environment would decide: `secateurs.recovery` weighs each part itself.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        kind = accelerator.distributed_type.name
        if several and not kind.startswith("MULTI_"):
            raise RecipeError(
                f"recovery keeps the whole network in every process, and the launcher asks for {kind}; "
                f"launch without it (`accelerate launch --multi_gpu`), or set `recovery.loop: plain`."
            )
        yield accelerator
    finally:
        for state, before in zip(states, saved, strict=True):
            state._shared_state.clear()
            state._shared_state.update(before)
