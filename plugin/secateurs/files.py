"""Reading what others may have written (plain files of bounded size, plain JSON, folders without links), and writing files whole."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from secateurs.errors import UserError

__all__ = ["LARGEST", "atomic_path", "parse_form", "plain_json", "read_file", "read_form", "refuse_links", "write_text"]

LARGEST = 64 * 2**20
"""Bytes of a JSON file that are read."""

Form = TypeVar("Form", bound=BaseModel)


def read_file(path: Path, kind: str, error: type[UserError] = UserError, *, limit: int = LARGEST) -> bytes:
    """Return the content of a plain file; a pipe or a device, which might never end, is not one.

    Args:
        path: of the file.
        kind: what the file is called in messages.
        error: what is raised.
        limit: bytes that are read at most.

    Raises:
        UserError: of the kind given: it cannot be read, is no plain file, or is larger.
    """
    try:
        seen = path.stat()
        if not stat.S_ISREG(seen.st_mode):
            raise error(f"cannot read the {kind} {str(path)!r}: it is no plain file.")
        if seen.st_size <= limit:
            with path.open("rb") as file:
                content = file.read(limit + 1)
            if len(content) <= limit:
                return content
    except (OSError, ValueError) as cause:
        raise error(f"cannot read the {kind} {str(path)!r}: {getattr(cause, 'strerror', None) or cause}.") from None
    raise error(f"the {kind} {str(path)!r} has {path.stat().st_size} bytes; at most {limit} are read.")


def plain_json(content: str | bytes, what: str, error: type[UserError] = UserError) -> Any:
    """Read JSON as the standard has it: no NaN, no infinity, no key twice in one object, no nesting without end.

    Integers have at most 64 bits.

    Args:
        content: text, or UTF-8.
        what: how messages begin.
        error: what is raised.

    Raises:
        UserError: of the kind given: it is something else.

    >>> plain_json('{"a": [1, 0.5]}', "the example")
    {'a': [1, 0.5]}
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_integer)
    except RecursionError:
        raise error(f"{what} is not JSON that is read here: it is nested too deeply.") from None
    except ValueError as cause:
        raise error(f"{what} is not JSON that is read here: {str(cause)[:200]}.") from None


def parse_form(content: str | bytes, form: type[Form], what: str, error: type[UserError] = UserError) -> Form:
    """Read JSON into a form; arguments and errors as for `plain_json`."""
    try:
        found = form.model_validate_json(content)
    except ValidationError as cause:
        first = cause.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"][:6]) or "the whole"
        raise error(f"{what} does not have its form: {where}: {first['msg'][:200]}.") from None
    plain_json(content, what, error)
    return found


def read_form(
    path: Path, form: type[Form], kind: str, error: type[UserError] = UserError, *, limit: int = LARGEST
) -> Form:
    """Read a JSON file into a form; arguments and errors as for `read_file` and `plain_json`."""
    return parse_form(read_file(path, kind, error, limit=limit), form, f"the {kind} {str(path)!r}", error)


def refuse_links(folder: Path) -> None:
    """Refuse an output folder that holds a symbolic link on any level: what is written or removed through one lies elsewhere.

    Args:
        folder: may be missing.

    Raises:
        UserError: there is a link.
    """
    for here, folders, names in os.walk(folder):
        for name in sorted((*folders, *names)):
            path = Path(here, name)
            if path.is_symlink():
                raise UserError(
                    f"the output folder {str(folder)!r} holds the symbolic link {str(path.relative_to(folder))!r}, through which nothing is "
                    "written or removed; replace it by what it points to, or choose another folder."
                )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"{digits[:20]}... is an integer of more than 64 bits")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` if the block ends well, and is removed if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
