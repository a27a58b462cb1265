"""The plugin manager: loads plugins without letting one of them break the rest, and collects what they register.

There is no global manager. Built-in passes, the adapters and third-party plugins all come through the same hooks.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from secateurs import hookspecs
from secateurs.errors import NameTakenError, PluginError
from secateurs.passes import builtin
from secateurs.registry import Registrar, Registry

if TYPE_CHECKING:
    from secateurs.devices import Device
    from secateurs.interfaces import (
        Converter,
        CostModel,
        DatasetLoader,
        Exporter,
        Metric,
        ModelLoader,
        StructureCostModel,
        Target,
    )
    from secateurs.passes.base import Pass

__all__ = ["Manager", "PluginWarning", "Registries", "create_manager"]

GROUP = "secateurs"
DISABLE_VARIABLE = "SECATEURS_DISABLE_PLUGINS"


class PluginWarning(UserWarning):
    """A plugin was skipped; the message names it and says why."""


@dataclass(frozen=True)
class Registries:
    """Everything that plugins registered, by kind."""

    passes: Registry[type[Pass]] = field(default_factory=lambda: Registry("pass"))
    models: Registry[ModelLoader] = field(default_factory=lambda: Registry("model loader"))
    datasets: Registry[DatasetLoader] = field(default_factory=lambda: Registry("data source"))
    exporters: Registry[Exporter] = field(default_factory=lambda: Registry("exporter"))
    converters: Registry[Converter] = field(default_factory=lambda: Registry("converter"))
    targets: Registry[Target] = field(default_factory=lambda: Registry("provider"))
    metrics: Registry[Metric] = field(default_factory=lambda: Registry("metric"))
    cost_models: Registry[CostModel | StructureCostModel] = field(default_factory=lambda: Registry("cost model"))
    devices: Registry[Device] = field(default_factory=lambda: Registry("device"))
    commands: Registry[Callable[..., Any]] = field(default_factory=lambda: Registry("command"))


class Manager(pluggy.PluginManager):
    """A pluggy manager for Secateurs' hooks with the registries that its plugins filled.

    Attributes:
        registries: what was registered.
    """

    def __init__(self) -> None:
        super().__init__("secateurs")
        self.add_hookspecs(hookspecs)
        self.registries = Registries()

    def adopt(self, plugin: object, name: str) -> None:
        """Register a plugin under `name` and let it fill the registries.

        Raises:
            PluginError: it implements a hook that does not exist, or claims a name that another plugin has.
        """
        try:
            self.register(plugin, name=name)
            self.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self.has_plugin(name):
                self.unregister(name=name)
            raise PluginError(f"plugin {name!r}: {error}. See `secateurs.hookspecs` for the hooks.") from error
        try:
            self._fill_registries(name)
        except BaseException:
            # A plugin that breaks off leaves nothing behind.
            self.unregister(name=name)
            for registry in vars(self.registries).values():
                registry.forget(name)
            raise

    def _fill_registries(self, name: str) -> None:
        for kind, registry in vars(self.registries).items():
            for implementation in getattr(self.hook, f"secateurs_register_{kind}").get_hookimpls():
                if implementation.plugin_name == name:
                    implementation.function(Registrar(registry, name))


def create_manager(disabled: Iterable[str] = (), *, external: bool = True) -> Manager:
    """Return a manager with the built-ins and every installed plugin.

    Args:
        disabled: names of plugins (entry points) to leave out; `*` leaves out all external ones. The environment variable
            `SECATEURS_DISABLE_PLUGINS` adds to it, separated by commas.
        external: whether to look for installed plugins at all.

    Raises:
        PluginError: two plugins register one name.

    Warns:
        PluginWarning: a plugin cannot be imported or breaks the rules; it is skipped.
    """
    manager = Manager()
    manager.adopt(builtin, "secateurs")
    blocked = {*disabled, *filter(None, os.environ.get(DISABLE_VARIABLE, "").split(","))}
    if not external or "*" in blocked:
        return manager
    for entry in sorted(
        importlib.metadata.entry_points(group=GROUP), key=lambda entry: (entry.name != "secateurs-adapters", entry.name)
    ):
        if entry.name in blocked or manager.has_plugin(entry.name):
            continue
        try:
            plugin = entry.load()
        except Exception as error:  # whatever a stranger's module raises on import must not stop the rest
            _warn(entry, f"cannot be imported ({type(error).__name__}: {error})")
            continue
        _adopt_or_warn(manager, entry, plugin)
    return manager


def _adopt_or_warn(manager: Manager, entry: importlib.metadata.EntryPoint, plugin: object) -> None:
    try:
        manager.adopt(plugin, entry.name)
    except NameTakenError:
        raise
    except PluginError as error:
        _warn(entry, str(error))
    except Exception as error:  # a registering hook of a stranger may raise anything
        _warn(entry, f"failed while registering ({type(error).__name__}: {error})")


def _warn(entry: importlib.metadata.EntryPoint, reason: str) -> None:
    distribution = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    warnings.warn(
        f"plugin {entry.name!r}{distribution} ({entry.value}) is skipped: {reason}. Update or uninstall it, or set "
        f"{DISABLE_VARIABLE}={entry.name}.",
        PluginWarning,
        stacklevel=4,
    )
