"""The options of every exporter, free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateurs.settings import PassSettings

__all__ = ["DynamoSettings", "OptimumSettings", "TorchScriptSettings"]


class DynamoSettings(PassSettings):
    """Options of the exporter `dynamo`."""

    sequence: Literal["auto", "free", "fixed"] = Field(
        "auto",
        description="the length of token inputs in the file: free, fixed at the example's, or free where that can be proved (auto)",
    )


class TorchScriptSettings(DynamoSettings):
    """Options of the exporter `torchscript`."""

    traced_branches: bool = Field(
        False,
        description="accept that tracing keeps one branch where the network decides by the values of its data",
    )


class OptimumSettings(PassSettings):
    """Options of the exporter `optimum`."""

    task: str | None = Field(None, description="Optimum's name of the task; None asks Optimum for the network's")
