"""Plans: the list of edits that turns the original structure into the pruned one, as data.

Edits apply in order; the indices of an edit refer to the structure that the edits before it leave. A plan holds no code: loading one replays
slices and attributes and needs neither a trace nor the dependency graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from secateurs.errors import PlanError
from secateurs.files import plain_json, read_file, write_text

__all__ = [
    "AddBias",
    "DropBlock",
    "Edit",
    "Plan",
    "RemoveUnits",
    "SetAttribute",
    "Slice",
    "SplitAttention",
    "unnumbered",
]

MAX_PLAN_BYTES = 64 * 1024 * 1024


class _Edit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    reason: str = ""


class Slice(BaseModel):
    """Indices that leave one dimension of one parameter or buffer.

    Attributes:
        module: qualified name of the module; empty for the network itself.
        parameter: name of the parameter or buffer in it.
        dim: the dimension.
        removed: the indices, sorted, as they are before this edit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    module: str
    parameter: str
    dim: int = Field(ge=0)
    removed: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)


class DropBlock(_Edit):
    """Bypass a block whole: it becomes the identity of its first input.

    Attributes:
        path: of the block.
        elements: how many values the block returns as a tuple; None where it returns a tensor.
        also: further modules that are bypassed with it: a convolution in front of its normalisation.
    """

    edit: Literal["drop_block"] = "drop_block"
    path: str
    elements: int | None = Field(None, ge=1, le=1000)
    also: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module that is bypassed."""
        return (self.path, *self.also)


class RemoveUnits(_Edit):
    """Remove units of one group from everything that is coupled with them."""

    edit: Literal["remove_units"] = "remove_units"
    root: str
    units: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    slices: tuple[Slice, ...] = Field(min_length=1)


class SetAttribute(_Edit):
    """Set a plain attribute that depends on widths, for example `out_channels`."""

    edit: Literal["set_attribute"] = "set_attribute"
    module: str
    name: str
    value: bool | int | float | str | tuple[int, ...] | None

    @field_validator("value")
    @classmethod
    def _whole(cls, value: object) -> object:
        """Refuse integers that JSON readers do not hold."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**64:
                raise ValueError(f"{number} has more than 64 bits")
        return value


class AddBias(_Edit):
    """Give a layer the bias that refit needs."""

    edit: Literal["add_bias"] = "add_bias"
    module: str


class SplitAttention(_Edit):
    """Put `secateurs.modules.SeparateAttention` in the place of a `torch.nn.MultiheadAttention`: the same function, heads that can go."""

    edit: Literal["split_attention"] = "split_attention"
    module: str


Edit = Annotated[DropBlock | RemoveUnits | SetAttribute | AddBias | SplitAttention, Field(discriminator="edit")]


class Plan(BaseModel):
    """An ordered list of edits; immutable, joined with `+`.

    >>> plan = Plan(edits=(DropBlock(path="layer1.1", reason="CKA 0.99"),))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    >>> len(plan + plan)
    2
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    edits: tuple[Edit, ...] = ()

    def __len__(self) -> int:
        return len(self.edits)

    def __bool__(self) -> bool:
        return bool(self.edits)

    def __add__(self, other: Plan) -> Plan:
        return Plan(edits=self.edits + other.edits)

    @property
    def removes(self) -> bool:
        """Whether any edit takes something away."""
        return self.removals > 0

    @property
    def removals(self) -> int:
        """How many edits take something away; the others change the form alone."""
        return sum(isinstance(edit, (DropBlock, RemoveUnits)) for edit in self.edits)

    def of(self, *kinds: type[Any]) -> Iterator[Any]:
        """Yield the edits of the given kinds, in order."""
        return (edit for edit in self.edits if isinstance(edit, kinds))

    def kept(self, module: str, parameter: str, dim: int, size: int) -> list[int]:
        """Return the original indices of one dimension that are left after the plan, in order.

        >>> piece = Slice(module="a", parameter="weight", dim=0, removed=(1,))
        >>> edit = RemoveUnits(root="a", units=(1,), slices=(piece,))
        >>> Plan(edits=(edit, edit)).kept("a", "weight", 0, 4)
        [0, 3]
        """
        left = list(range(size))
        for edit in self.of(RemoveUnits):
            for piece in edit.slices:
                if (piece.module, piece.parameter, piece.dim) == (module, parameter, dim):
                    gone = set(piece.removed)
                    left = [index for position, index in enumerate(left) if position not in gone]
        return left

    @classmethod
    def join(cls, plans: Iterable[Plan]) -> Plan:
        """Return the plans one after the other as one."""
        return cls(edits=tuple(edit for plan in plans for edit in plan.edits))

    def to_json(self) -> str:
        """Return the plan as JSON text, one edit per line."""
        edits = ",\n  ".join(json.dumps(edit.model_dump(mode="json")) for edit in self.edits)
        body = f"\n  {edits}\n" if edits else ""
        return f'{{"schema_version": {self.schema_version}, "edits": [{body}]}}\n'

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan.

        Raises:
            PlanError: it is not JSON, or not a plan of a known version.
        """
        if len(text) > MAX_PLAN_BYTES:
            raise PlanError(f"the plan has {len(text)} bytes; at most {MAX_PLAN_BYTES} are read.")
        plain_json(text, "not a plan of schema version 1: it", PlanError)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(
                f"not a plan of schema version 1: {where}: {first['msg']}. Write plans with `secateurs run`."
            ) from None

    def save(self, path: Path) -> None:
        """Write the plan to `path`, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from `path`."""
        return cls.from_json(read_file(path, "plan", PlanError, limit=MAX_PLAN_BYTES))


def unnumbered(path: str) -> str:
    """Return a module's path with `*` for each index into a list: what layers of one kind have in common.

    >>> unnumbered("layer.0.fc1")
    'layer.*.fc1'
    """
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
