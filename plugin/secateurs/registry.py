"""Named things that plugins bring: passes, models, data sets, exporters, targets, metrics, cost models, commands.

A registry maps a name to a lazily imported target (`"package.module:attribute"` or the object itself), remembers which plugin brought it,
refuses two owners of one name, and answers an unknown name with the nearest known one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from secateurs.errors import NameTakenError, PluginError, RecipeError, unknown_name

__all__ = ["Entry", "Registrar", "Registry"]

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered name.

    Attributes:
        name: what recipes call it.
        target: the object, or `"package.module:attribute"`, imported when it is first used.
        plugin: who registered it.
        summary: one line for listings.
        settings: the pydantic model of its options, or where it is; None where there are none.
    """

    name: str
    target: T | str
    plugin: str
    summary: str = ""
    settings: Any = None

    def load(self) -> T:
        """Import the target if it is still a reference, and return it."""
        return cast("T", _resolve(self.target, self))

    def make(self) -> T:
        """Return the target, as an instance if it is a class."""
        target: Any = self.load()
        return cast("T", target() if isinstance(target, type) else target)

    def load_settings(self) -> Any:
        """Return the pydantic model of the options, importing it if it is a reference."""
        return _resolve(self.settings, self)


def _resolve(target: object, entry: Entry[Any]) -> object:
    if not isinstance(target, str):
        return target
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{entry.name!r} of plugin {entry.plugin!r} cannot be imported from {target!r}: {error}. "
            f"Install what that plugin needs, or disable the plugin."
        ) from error


class Registry(Generic[T]):
    """The names of one kind.

    >>> colours: Registry[str] = Registry("colour")
    >>> colours.register("red", "colorsys:rgb_to_hsv", plugin="doc")
    >>> colours["red"].plugin
    'doc'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, target: T | str, *, plugin: str, summary: str = "", settings: Any = None) -> None:
        """Add a name.

        Raises:
            NameTakenError: another plugin has the name already.
        """
        if name in self._entries:
            first = self._entries[name]
            raise NameTakenError(
                f"two plugins register the {self.kind} {name!r}: {first.plugin!r} ({first.target!r}) and {plugin!r} ({target!r}). "
                f"Disable one of them."
            )
        self._entries[name] = Entry(name, target, plugin, summary, settings)

    def forget(self, plugin: str) -> None:
        """Drop everything that one plugin registered."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.plugin != plugin}

    def __getitem__(self, name: str) -> Entry[T]:
        try:
            return self._entries[name]
        except KeyError:
            raise RecipeError(unknown_name(self.kind, name, self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __len__(self) -> int:
        return len(self._entries)


class Registrar(Generic[T]):
    """What a registering hook receives: `register(name, target, summary=..., settings=...)`, on behalf of one plugin."""

    def __init__(self, registry: Registry[T], plugin: str) -> None:
        self._registry = registry
        self._plugin = plugin

    def __call__(self, name: str, target: T | str, *, summary: str = "", settings: Any = None) -> None:
        """Register `target` under `name`."""
        self._registry.register(name, target, plugin=self._plugin, summary=summary, settings=settings)
