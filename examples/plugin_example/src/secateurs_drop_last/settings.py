"""The options of `drop-last-block`, free of torch."""

from __future__ import annotations

from pydantic import Field

from secateurs.settings import PassSettings

__all__ = ["DropLastBlockSettings"]


class DropLastBlockSettings(PassSettings):
    """Options of `drop-last-block`."""

    count: int = Field(default=1, ge=1, description="how many removable blocks to bypass, from the output backwards")
