"""What the user puts into a recipe: variables, and `--set key=value`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from secateurs.errors import RecipeError, unknown_name
from secateurs.plain_yaml import MAX_DEPTH, read_yaml

__all__ = ["MAX_CHARACTERS", "Substitution", "override", "plain_data"]

MAX_CHARACTERS = 256 * 1024
"""Characters that a recipe may have once its variables are put in; a key or value that is no text counts as 8."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def plain_data(data: Any, what: str) -> Any:
    """Return a copy in which every key is text, as JSON has it, and so is what JSON does not know, such as a date.

    Args:
        data: what YAML holds; nodes may be shared.
        what: it is called in messages.

    Raises:
        RecipeError: it holds itself, or has a key that has no text.
    """
    try:
        return json.loads(json.dumps(data, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} is not plain data: {error}. Keys are text, and nothing may hold itself.") from None


def override(data: dict[str, Any], variables: dict[str, Any], text: str, known: Sequence[str]) -> None:
    """Set a variable or a dotted key in place.

    Args:
        data: the recipe as plain data.
        variables: of the recipe, by name.
        text: `key=value`; the value is YAML. Lists are entered by position or by the name of an item, and missing mappings are made.
        known: the keys that a recipe may have.

    Raises:
        RecipeError: the text has no such form, or the key leads nowhere.
    """
    key, sign, given = text.partition("=")
    if not sign or not key:
        raise RecipeError(f"`--set` takes key=value, got {text!r}.")
    what = f"the value of `--set {key}`"
    value = plain_data(read_yaml(given, what), what)
    if key in variables:
        variables[key] = value
        return
    *path, last = key.split(".")
    if path == ["variables"]:
        variables[last] = value
        return
    if (path[0] if path else last) not in known:
        raise RecipeError(unknown_name("recipe key or variable", key.split(".")[0], {*known, *variables}))
    owner: Any = data
    for part in path:
        owner = _child(owner, part, key)
    if isinstance(owner, list):
        owner[_position(owner, last, key)] = value
    elif isinstance(owner, dict):
        owner[last] = value
    else:
        raise RecipeError(f"`--set {key}`: {path[-1]!r} is not a mapping.")


class Substitution:
    """Puts variables in the place of `${name}`, and adds up how large the recipe becomes.

    Args:
        variables: by name; each place gets a copy.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._variables, self._left = variables, MAX_CHARACTERS

    def of(self, value: Any, where: str, level: int = 0) -> Any:
        """Return a copy of the value with every variable replaced.

        Args:
            value: plain data.
            where: its dotted key, for messages.
            level: lists and mappings around it.

        Raises:
            RecipeError: a variable is not known, or the whole becomes larger than `MAX_CHARACTERS` or deeper than `MAX_DEPTH`.
        """
        self._count(value, where, level)
        if isinstance(value, dict):
            return {key: self.of(item, f"{where}.{key}".lstrip("."), level + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, f"{where}.{number}", level + 1) for number, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _VARIABLE.fullmatch(value)
        return self._copy(self._value(whole, where), where, level) if whole else self._filled(value, where)

    def _filled(self, text: str, where: str) -> str:
        def put(match: re.Match[str]) -> str:
            return str(self._copy(self._value(match, where), where, 0))

        return _VARIABLE.sub(put, text)

    def _value(self, match: re.Match[str], where: str) -> Any:
        if match[1] not in self._variables:
            raise RecipeError(
                f"`{where}`: "
                + unknown_name("variable", match[1], self._variables)
                + " Set it with `--set NAME=VALUE`."
            )
        return self._variables[match[1]]

    def _copy(self, value: Any, where: str, level: int) -> Any:
        self._count(value, where, level)
        if isinstance(value, dict):
            return {key: self._copy(item, where, level + 1) for key, item in value.items()}
        return [self._copy(item, where, level + 1) for item in value] if isinstance(value, list) else value

    def _count(self, value: Any, where: str, level: int) -> None:
        keys = sum(len(key) if isinstance(key, str) else 8 for key in value) if isinstance(value, dict) else 0
        self._left -= len(value) if isinstance(value, str) else 8 + keys
        if self._left < 0 or level > MAX_DEPTH:
            raise RecipeError(
                f"`{where[:200]}`: with its variables put in, the recipe has more than {MAX_CHARACTERS} characters or {MAX_DEPTH} levels; "
                "use fewer of them."
            )


def _child(owner: Any, part: str, key: str) -> Any:
    if isinstance(owner, list):
        position = _position(owner, part, key)
        item = owner[position]
        if isinstance(item, str) and item == part:
            item = owner[position] = {part: {}}
        if isinstance(item, dict) and part in item and item[part] is None:
            item[part] = {}
        return item[part] if isinstance(item, dict) and part in item and not part.isdigit() else item
    if not isinstance(owner, dict):
        raise RecipeError(f"`--set {key}`: there is nothing below {part!r}.")
    if owner.get(part) is None:
        owner[part] = {}
    return owner[part]


def _position(owner: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(owner):
        return int(part)
    for number, item in enumerate(owner):
        if item == part or (isinstance(item, dict) and part in item):
            return number
    raise RecipeError(f"`--set {key}`: {part!r} is not an item of that list of {len(owner)}.")
