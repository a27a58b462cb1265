"""The hooks of Secateurs (entry-point group and project name `secateurs`).

A plugin is a module with functions that carry these names and the decorator `secateurs.hookimpl`. Keep the module light: import what is heavy
inside the functions, or register `"package.module:attribute"` strings, which are imported when they are used. Hooks are called by keyword, and
an implementation takes only the arguments it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from secateurs.attention import AttentionHeads
    from secateurs.blocks import Block
    from secateurs.data import Dataset
    from secateurs.devices import Device
    from secateurs.interfaces import (
        Converter,
        CostModel,
        DatasetLoader,
        Exporter,
        Metric,
        ModelLoader,
        ProgressEvent,
        StructureCostModel,
        Target,
    )
    from secateurs.passes.base import Pass
    from secateurs.plan import Plan
    from secateurs.registry import Registrar
    from secateurs.report import PassRecord, Report

hookspec = pluggy.HookspecMarker("secateurs")


@hookspec
def secateurs_register_passes(register: Registrar[type[Pass]]) -> None:
    """At start-up: call `register(name, "module:Class", summary=..., settings="module:Settings")` for each pass."""


@hookspec
def secateurs_register_models(register: Registrar[ModelLoader]) -> None:
    """At start-up: register loaders; the name is the key in a recipe's `model` section (`factory`, `hf`, ...)."""


@hookspec
def secateurs_register_datasets(register: Registrar[DatasetLoader]) -> None:
    """At start-up: register data sources; the name is what a role's `source` says, `settings` the model of its other keys."""


@hookspec
def secateurs_register_exporters(register: Registrar[Exporter]) -> None:
    """At start-up: register exporters; the name is what `export.exporter` says.

    With `settings`, the target is called with an instance of them, made from `export.options`, and returns the exporter.
    """


@hookspec
def secateurs_register_converters(register: Registrar[Converter]) -> None:
    """At start-up: register converters of exported files; `quantise-NAME` is what `quantise.mode: NAME` asks for."""


@hookspec
def secateurs_register_targets(register: Registrar[Target]) -> None:
    """At start-up: register targets under the names of the execution providers that they measure on."""


@hookspec
def secateurs_register_metrics(register: Registrar[Metric]) -> None:
    """At start-up: register metrics; the name is what `metric` says."""


@hookspec
def secateurs_register_cost_models(register: Registrar[CostModel | StructureCostModel]) -> None:
    """At start-up: register cost models; one that depends on a target is a `StructureCostModel`. `macs` and `parameters` are built in."""


@hookspec
def secateurs_register_devices(register: Registrar[Device]) -> None:
    """At start-up: register device profiles; the name is what `budget.device` says. Give the profile itself, or `"module:attribute"`."""


@hookspec
def secateurs_register_commands(register: Registrar[Callable[..., Any]]) -> None:
    """At start-up: register sub-commands of `secateurs`: functions with typer annotations. Called before `--help` too: stay light."""


@hookspec(firstresult=True)
def secateurs_describe_blocks(model: nn.Module) -> list[Block] | None:
    """When the blocks of a network are looked for: return them in order of execution, or None to leave it to the next plugin."""


@hookspec(firstresult=True)
def secateurs_describe_attention(module: nn.Module) -> AttentionHeads | None:
    """When a module's attention heads are looked for: return their description, or None to leave it to the next plugin."""


@hookspec
def secateurs_before_pass(name: str, model: nn.Module) -> None:
    """Before a pass starts; the model is the one it will see. Do not change it."""


@hookspec
def secateurs_after_pass(name: str, model: nn.Module, record: PassRecord) -> None:
    """After a pass ended, with the network it leaves and the record that goes into the report."""


@hookspec
def secateurs_save_model(model: nn.Module, plan: Plan, example: Dataset, folder: Path) -> str | None:
    """When a run writes its network: write it into `folder` in a further form, and return a sentence on it for the report, or None.

    What is written goes into a sub-folder with a file `secateurs.json`, so that a later run may replace it. `example` is
    what the network is called with; change neither network nor plan.
    """


@hookspec
def secateurs_after_run(report: Report, folder: Path) -> None:
    """After a run wrote its output folder: the last hook of a run."""


@hookspec
def secateurs_progress(event: ProgressEvent) -> None:
    """During every long step: how far it is."""
