"""Entry point: registers the pass by name. It is imported at every start, so it imports nothing that is heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateurs import hookimpl

if TYPE_CHECKING:
    from secateurs.passes.base import Pass
    from secateurs.registry import Registrar


@hookimpl
def secateurs_register_passes(register: Registrar[type[Pass]]) -> None:
    """Register `drop-last-block`."""
    register(
        "drop-last-block",
        "secateurs_drop_last.drop_last:DropLastBlock",
        summary="bypass the last removable blocks, whatever they compute",
        settings="secateurs_drop_last.settings:DropLastBlockSettings",
    )
