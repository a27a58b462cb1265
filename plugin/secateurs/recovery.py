"""Recovery: the only place that trains a network. AdamW, one-cycle cosine schedule, optional distillation, best epoch kept.

The loop is written once; `secateurs.loops` runs it in one process or, through Hugging Face accelerate, in mixed precision and in several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from secateurs import processes, training_state
from secateurs.data import IGNORED, Dataset
from secateurs.errors import RecipeError, SecateursError
from secateurs.forward import call, device_of, inference, logits
from secateurs.loops import Loop, check_loop, open_loop
from secateurs.outputs import label_loss, prediction_rows, soft_loss
from secateurs.settings import RecoverySettings
from secateurs.training_state import TrainingState

__all__ = ["check_settings", "train"]


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_settings(settings: RecoverySettings, model: nn.Module, *, evaluated: bool) -> None:
    """Check that a training can be carried out here, before anything is trained.

    Args:
        settings: of the training.
        model: the network, for its device and its layers.
        evaluated: whether there is a metric on validation data.

    Raises:
        UserError: something that the settings ask for is missing; the message says what.
    """
    check_loop(settings, device_of(model))
    if settings.patience is not None and not evaluated:
        raise RecipeError(
            f"`recovery.patience: {settings.patience}` needs a metric on validation data; give labelled data, `evaluate`, or leave it out."
        )
    if settings.batch_size < (smallest := _smallest(model)):
        raise RecipeError(
            f"`recovery.batch_size: {settings.batch_size}` cannot train a network with BatchNorm; give at least {smallest}."
        )


def train(
    model: nn.Module,
    data: Dataset,
    settings: RecoverySettings,
    *,
    teacher: nn.Module | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    r"""Train `model` in place and return it with the best weights seen.

    The loss is $(1-a)\,\mathrm{CE} + a\,T^2\,\mathrm{KL}(\mathrm{teacher}_T \,\|\, \mathrm{model}_T)$ with $a = \tfrac12$ where there are
    both labels and a teacher. A step takes `gradient_accumulation` times `batch_size` examples and the gradient of their mean loss, in however
    many micro-batches and processes. Under a launcher (`accelerate launch`, `torchrun`) every process must call this with the same arguments.

    Args:
        model: the network; `requires_grad` decides what is trained, BatchNorm statistics included, and modes come out as they went in.
        data: training examples.
        settings: of the training.
        teacher: the dense network to learn from; None learns from labels alone.
        evaluate: metric on validation data, higher is better; the starting point counts as an epoch. None keeps the last epoch.
        seed: of the order of examples and of dropout.
        progress: called with the steps done, their total and a word.
        checkpoint: a folder that keeps the state after every epoch. A later call with the same arguments goes on from there, to the same
            weights; the state of another training is ignored.

    Raises:
        UserError: the settings ask for what is not there.
        SecateursError: there is nothing to learn from, or the loss is not finite.
    """
    if data.labels is None and teacher is None:
        raise SecateursError(
            "recovery has neither labels nor a teacher to learn from; give training labels, or set `distill: true`."
        )
    if settings.epochs == 0 or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    check_settings(settings, model, evaluated=evaluate is not None)
    with open_loop(settings, model, *([] if teacher is None else [teacher])) as loop:
        task = _Task(model, data, settings, teacher, evaluate, seed, progress or (lambda *_: None), loop)
        with _seeded(device_of(model)), _training_mode(model):
            try:
                _run(task, checkpoint)
            finally:
                model.zero_grad(set_to_none=True)
    return model


@dataclass(frozen=True)
class _Task:
    """What stays the same during one training; as the arguments of `train`."""

    model: nn.Module
    data: Dataset
    settings: RecoverySettings
    teacher: nn.Module | None
    evaluate: Callable[[nn.Module], float] | None
    seed: int
    progress: Callable[[int, int, str], None]
    loop: Loop

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @cached_property
    def smallest(self) -> int:
        return _smallest(self.model)

    @property
    def per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation

    @cached_property
    def steps(self) -> int:
        """The steps of all epochs; what is left of an epoch counts if BatchNorm can train on it."""
        whole, left = divmod(len(self.data), self.per_step)
        return self.settings.epochs * (whole + (left >= self.smallest))

    def value(self) -> float:
        """Evaluate in evaluation mode: a caller's function need not set it, and must not change BatchNorm statistics."""
        assert self.evaluate is not None
        with inference(self.model):
            return self.loop.agree(self.evaluate(self.model))


def _run(task: _Task, checkpoint: Path | None) -> None:
    """Train all epochs that are left, and leave the best weights."""
    settings, model = task.settings, task.model
    optimiser = torch.optim.AdamW(task.trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    key = "" if checkpoint is None else _key(task)
    found = None if checkpoint is None else training_state.read(checkpoint, key, model, task.trained)
    task.loop.prepare(optimiser)
    task.loop.share(model, repr((settings, task.seed, len(task.data))))
    finished = found.state.epoch if found else 0
    everywhere = task.loop.least(finished) == finished
    if found is not None and everywhere:
        state = found.apply(model, optimiser, task.loop)
    else:
        state = TrainingState()
        if task.evaluate is not None:
            state.best, state.kept = task.value(), training_state.snapshot(model)
    orders = torch.Generator().manual_seed(task.seed)
    for epoch in range(settings.epochs):
        order = task.data.like_lengths(torch.randperm(len(task.data), generator=orders).numpy(), task.per_step)
        if epoch < state.epoch:
            continue
        if settings.patience is not None and state.stale >= settings.patience:
            task.progress(state.step, state.step, f"no better for {state.stale} epochs: stopped after {epoch}")
            break
        # Dropout of an epoch depends on seed and epoch alone, so that a resumed training draws the same; every process draws its own.
        torch.manual_seed(task.seed + epoch * task.loop.processes + task.loop.rank)
        _epoch(task, optimiser, order, state)
        _judge(task, state)
        if checkpoint is not None and processes.is_main():
            training_state.write(checkpoint, key, state, model, optimiser, task.loop)
    training_state.restore(model, state.kept)


def _key(task: _Task) -> str:
    """Return a hash of all that the result depends on; the loop is left out, because it changes nothing."""
    settings = task.settings.model_dump_json(exclude={"loop"})
    return training_state.digest(
        task.model, task.teacher, task.data, settings, task.seed, task.evaluate is not None, torch.__version__
    )


def _epoch(task: _Task, optimiser: torch.optim.Optimizer, order: np.ndarray, state: TrainingState) -> None:
    """Train on every example once, in the given order."""
    for start in range(0, len(order), task.per_step):
        batch = task.data.take(order[start : start + task.per_step])
        if len(batch) < task.smallest:
            continue
        for group in optimiser.param_groups:
            group["lr"] = task.settings.learning_rate * _cosine(state.step, task.steps)
        optimiser.zero_grad(set_to_none=True)
        loss = _gradients(task, batch)
        if not math.isfinite(loss):
            raise SecateursError(f"the recovery loss is {loss} at step {state.step}; lower `recovery.learning_rate`.")
        task.loop.step(task.trained)
        state.step += 1
        task.progress(state.step, task.steps, f"loss {loss:.4f}")
    state.epoch += 1
    task.loop.level(task.model)


def _gradients(task: _Task, batch: Dataset) -> float:
    """Leave the gradients of the mean loss over the examples of a step, and return that loss."""
    total = torch.zeros((), device=device_of(task.model))
    for indices in task.loop.parts(len(batch), task.settings.batch_size, task.smallest):
        part = (batch if len(indices) == len(batch) else batch.take(indices)).trimmed()
        with task.loop.autocast():
            loss = _loss(task.model, task.teacher, part, task.settings, batch)
        task.loop.backward(loss)
        total += loss.detach()
    return task.loop.combine(task.trained, total)


def _judge(task: _Task, state: TrainingState) -> None:
    """Keep the weights if they are the best so far; of equals, the last."""
    if task.evaluate is None:
        return
    score, best = task.value(), state.best
    assert best is not None
    state.stale = 0 if score > best else state.stale + 1
    if score >= best:
        state.best, state.kept = score, training_state.snapshot(task.model)
    task.progress(state.step, task.steps, f"epoch {state.epoch}: {score:.4f}")


def _smallest(model: nn.Module) -> int:
    """Return how many examples a forward pass needs: a BatchNorm that learns cannot train on a single one."""
    norms = (name for name, module in model.named_modules() if isinstance(module, _NORMS))
    return 2 if any(_learns(model, name) for name in norms) else 1


def _cosine(step: int, steps: int) -> float:
    """Warm up over the first tenth, then half a cosine down to zero."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(
    model: nn.Module,
    teacher: nn.Module | None,
    batch: Dataset,
    settings: RecoverySettings,
    whole: Dataset | None = None,
) -> Tensor:
    """Return the share of `batch` in the mean loss over `whole`; without one, the mean over the batch."""
    whole = whole or batch
    prediction = logits(call(model, batch))
    flat = prediction_rows(prediction)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    terms: list[Tensor] = []
    if batch.labels is not None and whole.labels is not None:
        counted = max(1, int((whole.labels != IGNORED).sum()))
        terms.append(label_loss(flat, torch.as_tensor(batch.labels, device=flat.device)) / counted)
    if teacher is not None:
        with inference(teacher):
            target = prediction_rows(logits(call(teacher, batch)))
        rows = soft_loss(flat, target, settings.temperature)
        terms.append(_mean(rows, prediction.shape[:-1], batch, whole))
    return torch.stack(terms).mean()


def _mean(rows: Tensor, shape: torch.Size, batch: Dataset, whole: Dataset) -> Tensor:
    """Return the share of `batch` in the mean of `rows` over `whole`; where there is a row per token, without padding."""
    if batch.tokens is None or whole.tokens is None or batch.tokens.shape != shape:
        return rows.mean() * (len(batch) / len(whole))
    counted = torch.as_tensor(batch.tokens, device=rows.device).reshape(-1)
    return rows[counted].sum() / max(1, int(whole.tokens.sum()))


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Put the random generators of the CPU and of `device` back after a block, which seeds them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for name, module in model.named_modules():
            if isinstance(module, _NORMS) and not _learns(model, name):
                module.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _learns(model: nn.Module, path: str) -> bool:
    """Tell whether a module, or the nearest one around it that has parameters, has any to train."""
    while path and next(model.get_submodule(path).parameters(), None) is None:
        path = path.rpartition(".")[0]
    return any(parameter.requires_grad for parameter in model.get_submodule(path).parameters())
