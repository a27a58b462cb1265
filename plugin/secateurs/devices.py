"""Device profiles: what a board or phone has, and the limits and defaults that follow from it.

A profile limits memory and size, and names a provider and a number of threads. It never says how fast the device is: that is measured on it
(`secateurs bundle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateurs.budget import Budget
from secateurs.errors import BudgetError
from secateurs.registry import Registry
from secateurs.settings import TargetSettings

__all__ = ["MEMORY_SHARE", "Device", "fill_in"]

MEMORY_SHARE = 0.25
"""Share of a device's RAM that a network may take unless `budget.memory_share` says otherwise: the rest is for the system, the runtime and
the application, which on phones and single-board computers take the larger part."""


class Device(BaseModel):
    """What is known of one device; None where no source tells.

    Attributes:
        title: its name in full.
        ram_mib: the RAM of this variant; of a device that is sold with several sizes, the smallest, unless its name says which.
        cores: of the processor.
        threads: cores that are worth a thread: the fast ones where not all are alike.
        provider: execution provider that runs there without more than onnxruntime's package for the device.
        artifact_mib: size that all files may have, for example where a shop limits applications.
        sources: a web page for each of `ram_mib`, `cores` and `artifact_mib` that is given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    ram_mib: int | None = Field(None, gt=0)
    cores: int | None = Field(None, gt=0)
    threads: int = Field(1, ge=1)
    provider: str = "CPUExecutionProvider"
    artifact_mib: float | None = Field(None, gt=0)
    sources: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Device:
        """Refuse a figure without a source, and more threads than cores."""
        given = {name for name in ("ram_mib", "cores", "artifact_mib") if getattr(self, name) is not None}
        if given != set(self.sources):
            raise ValueError(f"sources are given for {sorted(self.sources)}, figures for {sorted(given)}")
        if self.cores is not None and self.threads > self.cores:
            raise ValueError(f"{self.threads} threads on {self.cores} cores")
        return self


def fill_in(
    budget: Budget, targets: Sequence[TargetSettings], devices: Registry[Device]
) -> tuple[Budget, tuple[TargetSettings, ...]]:
    """Return a budget and targets with what they leave to the budget's device, and with the measurements that the budget needs.

    What is given stays as it is: a device sets `peak_memory_mib` (its RAM times `memory_share`) and `artifact_mib` where the budget has
    none, and `provider` and `threads` of targets that do not name them. A limit `fits_mib` asks every target for the fits-test. Filling
    in twice changes nothing.

    Args:
        budget: of a recipe, or of a file.
        targets: of a recipe, or of the command line.
        devices: the profiles that are known.

    Raises:
        RecipeError: the device is unknown.
        BudgetError: a share is asked of a device whose RAM is not known.
    """
    targets = tuple(targets)
    if budget.device is not None:
        device = devices[budget.device].load()
        budget = budget.model_copy(update=_limits(budget, device))
        targets = tuple(target.model_copy(update=_defaults(target, device)) for target in targets)
    if budget.fits_mib is not None:
        targets = tuple(target.model_copy(update={"fits": True}) for target in targets)
    return budget, targets


def _limits(budget: Budget, device: Device) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if budget.peak_memory_mib is None and device.ram_mib is not None:
        share = MEMORY_SHARE if budget.memory_share is None else budget.memory_share
        limits = {"memory_share": share, "peak_memory_mib": device.ram_mib * share}
    elif budget.peak_memory_mib is None and budget.memory_share is not None:
        raise BudgetError(
            f"`budget.memory_share` is a share of RAM, and that of {device.title} is not published; give `peak_memory_mib`."
        )
    if budget.artifact_mib is None and device.artifact_mib is not None:
        limits["artifact_mib"] = device.artifact_mib
    return limits


def _defaults(target: TargetSettings, device: Device) -> dict[str, Any]:
    defaults = {"provider": device.provider, "threads": device.threads}
    return {name: value for name, value in defaults.items() if name not in target.model_fields_set}
