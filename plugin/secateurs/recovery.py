"""Recovery: the only place that trains a network. A plain loop: AdamW, one-cycle cosine schedule, optional distillation, best epoch kept.

Also the recalibration of BatchNorm statistics, which needs no gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from secateurs.data import Dataset
from secateurs.errors import SecateursError
from secateurs.forward import call, device_of, frozen_randomness, inference, kl_divergence, logits, predict
from secateurs.settings import RecoverySettings

__all__ = ["recalibrate", "train"]


def train(
    model: nn.Module,
    data: Dataset,
    settings: RecoverySettings,
    *,
    teacher: nn.Module | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    r"""Train `model` in place and return it with the best weights seen.

    The loss is $(1-a)\,\mathrm{CE} + a\,T^2\,\mathrm{KL}(\mathrm{teacher}_T \,\|\, \mathrm{model}_T)$ with $a = \tfrac12$ where there are
    both labels and a teacher.

    Args:
        model: the network; `requires_grad` decides what is trained, and modes come out as they went in.
        data: training examples.
        settings: of the training.
        teacher: the dense network to learn from; None learns from labels alone.
        evaluate: metric on validation data, higher is better; the starting point counts as an epoch. None keeps the last epoch.
        seed: of the order of examples.
        progress: called with the steps done, their total and a word.

    Raises:
        SecateursError: there is nothing to learn from, or the loss is not finite.
    """
    if data.labels is None and teacher is None:
        raise SecateursError(
            "recovery has neither labels nor a teacher to learn from; give training labels, or set `distill: true`."
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained or settings.epochs == 0:
        return model
    steps = math.ceil(len(data) / settings.batch_size) * settings.epochs
    optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, steps))
    best, kept = (_value(model, evaluate), copy.deepcopy(model.state_dict())) if evaluate is not None else (0.0, None)
    step = 0
    with frozen_randomness(seed), _training_mode(model):
        for epoch in range(settings.epochs):
            order = torch.randperm(len(data)).numpy()
            for batch in data.take(order).batches(settings.batch_size):
                if len(batch) < 2:
                    continue  # BatchNorm cannot train on a single example
                optimiser.zero_grad(set_to_none=True)
                loss = _loss(model, teacher, batch, settings)
                if not bool(loss.isfinite()):
                    raise SecateursError(
                        f"the recovery loss is {float(loss.detach())} at step {step}; lower `recovery.learning_rate`."
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimiser.step()
                schedule.step()
                step += 1
                if progress is not None:
                    progress(step, steps, f"loss {float(loss.detach()):.4f}")
            if evaluate is not None:
                score = _value(model, evaluate)
                if score >= best:
                    best, kept = score, copy.deepcopy(model.state_dict())
                if progress is not None:
                    progress(step, steps, f"epoch {epoch + 1}: {score:.4f}")
    if kept is not None:
        model.load_state_dict(kept)
    optimiser.zero_grad(set_to_none=True)
    return model


def _value(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    """Evaluate in evaluation mode: a caller's function need not set it, and must not change BatchNorm statistics."""
    with inference(model):
        return evaluate(model)


def _cosine(step: int, steps: int) -> float:
    """Warm up over the first tenth, then half a cosine down to zero."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(model: nn.Module, teacher: nn.Module | None, batch: Dataset, settings: RecoverySettings) -> Tensor:
    prediction = logits(call(model, batch))
    flat = prediction.reshape(-1, prediction.shape[-1])
    terms: list[Tensor] = []
    if batch.labels is not None:
        labels = torch.as_tensor(batch.labels, device=device_of(model)).reshape(-1)
        terms.append(F.cross_entropy(flat, labels))
    if teacher is not None:
        with inference(teacher):
            target = logits(call(teacher, batch)).reshape(-1, prediction.shape[-1])
        temperature = settings.temperature
        divergence = F.kl_div(
            F.log_softmax(flat / temperature, -1),
            F.log_softmax(target / temperature, -1),
            log_target=True,
            reduction="batchmean",
        )
        terms.append(temperature**2 * divergence)
    return torch.stack(terms).mean()


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, training in modes:
            module.training = training


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def recalibrate(
    model: nn.Module, dense: nn.Module, calibration: Dataset, held_out: Dataset, *, batch_size: int = 128
) -> bool:
    """Re-estimate the running statistics of every BatchNorm in place, and keep them only if the held-out divergence falls.

    Args:
        model: the pruned network.
        dense: the network whose predictions it should keep.
        calibration: examples for the statistics.
        held_out: other examples, for the decision.
        batch_size: examples per forward pass.

    Returns:
        Whether the new statistics were kept.
    """
    norms = [module for module in model.modules() if isinstance(module, _NORMS) and module.track_running_stats]
    if not norms:
        return False
    reference = predict(dense, held_out)
    before = kl_divergence(reference, predict(model, held_out))
    saved = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        with torch.no_grad():
            for batch in calibration.batches(batch_size):
                if len(batch) > 1:
                    call(model, batch)
    finally:
        for norm, momentum, _ in saved:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if kl_divergence(reference, predict(model, held_out)) < before:
        return True
    for norm, _, state in saved:
        norm.load_state_dict(state)
    return False
