"""Text of unknown origin on a terminal: neither markup nor control characters of it take effect."""

from __future__ import annotations

from rich import markup

from secateurs.errors import printable

__all__ = ["escape"]


def escape(text: str) -> str:
    r"""Return text for rich, which shows it as it is, with its control characters written out.

    >>> escape("[red]conv\x1b[2J")
    '\\[red]conv\\x1b[2J'
    """
    return markup.escape(printable(text))
