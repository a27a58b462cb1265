"""YAML of unknown origin as plain data: text, numbers, lists and mappings.

Limits hold while a file is read, not after: a short file can describe more than fits into memory, or take hours to read.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from secateurs.errors import RecipeError, UserError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_DIGITS", "MAX_NODES", "load_yaml", "read_yaml", "to_yaml"]

MAX_BYTES = 512 * 1024
"""Bytes of a file."""
MAX_NODES = 20_000
"""Keys and values of a file, on all levels."""
MAX_DEPTH = 50
"""Levels of lists and mappings."""
MAX_DIGITS = 64
"""Characters of a number."""


class _RefusedError(yaml.YAMLError):
    """The text is YAML, and not plain."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader of bounded size, without aliases, tags, keys that come twice, and text that no file can hold."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes, self._depth = 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(f"line {line} uses a YAML alias (`*name`); write the value out")
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(f"line {line} uses a YAML tag (`{event.tag[:60]}`); leave it out")
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES:
            raise _RefusedError(f"line {line} goes beyond {MAX_NODES} keys and values")
        if self._depth > MAX_DEPTH:
            raise _RefusedError(f"line {line} goes deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        line = node.start_mark.line + 1
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise _RefusedError(
                f"line {line} has a number of {len(node.value)} characters; at most {MAX_DIGITS} are read"
            )
        value = super().construct_scalar(node)
        if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
            raise _RefusedError(f"line {line} has a text with NUL or half a surrogate pair; no file can hold that")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if isinstance(node, yaml.MappingNode) and len(found) < len(node.value):
            raise _RefusedError(f"the mapping at line {node.start_mark.line + 1} has a key twice; keep one of them")
        return found


class _PlainDumper(yaml.SafeDumper):
    """A safe dumper of what `_PlainLoader` reads: nothing is said by an alias."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - whatever the value
        return True


def to_yaml(data: Any) -> str:
    """Return plain data as YAML that `read_yaml` reads back."""
    text: str = yaml.dump(data, Dumper=_PlainDumper, sort_keys=False, width=120)
    return text


def load_yaml(path: Path, kind: str, error: type[UserError] = RecipeError) -> Any:
    """Read a YAML file as plain data.

    Args:
        path: of the file.
        kind: what the file is called in messages.
        error: what is raised.

    Raises:
        UserError: of the kind given: it cannot be read, is no YAML, uses aliases or tags, or goes beyond a limit of this module.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise error(f"the {kind} {str(path)!r} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read.")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as cause:
        why = getattr(cause, "strerror", None) or cause
        raise error(f"cannot read the {kind} {str(path)!r}: {why}. Give the path of a YAML file.") from None
    return read_yaml(text, f"the {kind} {str(path)!r}", error)


def read_yaml(text: str, what: str, error: type[UserError] = RecipeError) -> Any:
    """Read YAML text as plain data.

    Args:
        text: at most `MAX_BYTES` long.
        what: how messages begin.
        error: what is raised.

    Raises:
        UserError: of the kind given; see `load_yaml`.

    >>> read_yaml("{a: [1, 0.5, text]}", "the example")
    {'a': [1, 0.5, 'text']}
    """
    if len(text) > MAX_BYTES:
        raise error(f"{what} has {len(text)} characters; at most {MAX_BYTES} are read.")
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _RefusedError as cause:
        raise error(f"{what} is not plain YAML: {cause}.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as cause:  # dates and numbers that cannot be
        raise error(f"{what} is not YAML: {' '.join(str(cause).split())[:400]}.") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
