"""Every error that Secateurs raises on purpose, and the words they share.

An error says what is wrong, the value it got, what is allowed, and what to do next. Its class fixes the exit code of the command line:
2 for something the user wrote (`UserError`), 3 for a run that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CertificateError",
    "DataError",
    "ExportError",
    "GroupError",
    "ModelError",
    "NameTakenError",
    "PlanError",
    "PluginError",
    "ProviderError",
    "RecipeError",
    "SecateursError",
    "UserError",
    "first_line",
    "last_line",
    "printable",
    "shown",
    "unknown_name",
]


class SecateursError(Exception):
    """The run failed for a reason that Secateurs understands."""

    exit_code = 3


class UserError(SecateursError):
    """The recipe, the arguments or the files given are wrong; nothing was written."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or an argument does not follow the documented form."""


class ModelError(UserError):
    """A network cannot be built, or its weights do not fit."""


class DataError(UserError):
    """A data set is empty, malformed, not finite, or overlaps another role."""


class BudgetError(UserError):
    """A budget names an unknown limit or an impossible value."""


class ProviderError(UserError):
    """An execution provider is unknown or not available here."""


class PlanError(UserError):
    """A plan cannot be read, or does not fit the network it is applied to."""


class PluginError(UserError):
    """A plugin breaks the rules, for example with a hook that does not exist."""


class NameTakenError(PluginError):
    """Two plugins register one name."""


class ExportError(SecateursError):
    """The network could not be written as ONNX, or the file does not do what the network does."""


class GroupError(SecateursError):
    """The dependency graph of a network could not be built."""


class CertificateError(SecateursError):
    """The check of the pruned network against the masked original could not be carried out."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not registered, with the nearest known names.

    >>> unknown_name("pass", "mi-node", ["cka-cluster", "mi-nodes"])
    "unknown pass 'mi-node'. Did you mean 'mi-nodes'? Known: 'cka-cluster', 'mi-nodes'."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(repr(n) for n in names) or "none"
    return f"unknown {kind} {name!r}.{hint} Known: {listed}."


def shown(value: object, limit: int = 200) -> str:
    """Return a value as an error shows it: as Python writes it, cut to `limit` characters.

    >>> shown("a" * 8, limit=6)
    "'aaaaa..."
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, data nested without end
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message; the name of its class where it has none.

    >>> first_line(ValueError("wrong\nmore on it")), first_line(AssertionError())
    ('wrong', 'AssertionError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    r"""Return the last line of an error's message; the name of its class where it has none.

    >>> last_line(ValueError("more on it\nwrong")), last_line(AssertionError())
    ('wrong', 'AssertionError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def printable(text: str) -> str:
    r"""Return a text whose control characters are written out, so that a name cannot steer the terminal it is printed on.

    >>> print(printable("layer\x1b[2J"))
    layer\x1b[2J
    """
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
