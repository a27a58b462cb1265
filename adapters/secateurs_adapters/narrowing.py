"""An exported network at other widths, without exporting it again.

Tracing takes seconds, and a search over widths asks hundreds of times. The network is exported as it is, and twice with
some units of every group removed. What differs between the files, the sizes of constants and the integers in them and in
attributes, is the figure of the dense file less so many for each unit that goes; the file at any widths follows. Its
weights are the first entries of the dense ones: right in shape, meaningless in value. A network whose files do not follow
is refused: to export it for all widths that a search asks for would take hours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from secateurs.errors import ExportError
from secateurs.groups import Group, plan_removal
from secateurs.layers import slice_dimensions
from secateurs.plan import Plan
from secateurs.surgery import applied
from secateurs_adapters.export import DynamoExporter
from secateurs_adapters.export_settings import DynamoSettings

if TYPE_CHECKING:
    from torch import nn

    from secateurs.data import Dataset

__all__ = ["NarrowedExport", "exported_model"]

OPSET = 20
MOST_GROUPS = 3
"""Groups that an integer may count together: the parts of a concatenation."""

Share = Mapping[str, int]
"""How many entries go with each unit of a group, by the group's root."""


def exported_model(model: nn.Module, example: Dataset) -> Any:
    """Return a network as an `onnx.ModelProto`, with a free batch size and the example's sequence length.

    Raises:
        ExportError: it cannot be exported.
    """
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        path = Path(folder) / "model.onnx"
        DynamoExporter(DynamoSettings(sequence="fixed"))(model, example, path, opset=OPSET)
        return onnx.load(str(path))


class NarrowedExport:
    """The exported files of all widths of a network.

    Args:
        model: the network; it is not changed, and not kept.
        example: inputs for the export.
        groups: whose widths vary; of groups that share a layer, each at most once.

    Raises:
        ExportError: the network cannot be exported, or its files do not follow from the widths.
    """

    def __init__(self, model: nn.Module, example: Dataset, groups: Sequence[Group]) -> None:
        self._groups = {group.root: group for group in groups}
        self._dense = exported_model(model, example)
        self._sizes: dict[str, list[Share]] = _shares_by_name(model, groups, self._dense)
        self._numbers: dict[str, Share] = {}
        if groups and not self._learn(model, example):
            raise ExportError(
                "what the exported file looks like at other widths cannot be told from two narrower exports of this network, so that its "
                "latency and peak memory cannot be predicted; give `target_macs` or `target_parameters` and gate the measured figures by "
                "`budget`."
            )

    def at(self, keep: Mapping[str, int]) -> Any:
        """Return the file, an `onnx.ModelProto`, when `keep[root]` units of each group stay; absent groups keep all."""
        gone = self._gone(keep)
        model = onnx.ModelProto()
        model.CopyFrom(self._dense)
        del model.graph.value_info[:]
        for tensor in model.graph.initializer:
            shares = self._sizes.get(tensor.name)
            if shares is not None:
                left = [size - _lost(share, gone) for size, share in zip(tensor.dims, shares, strict=True)]
                array = numpy_helper.to_array(tensor)[tuple(slice(size) for size in left)]
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
        for name, value, write in _numbers(model):
            if name in self._numbers:
                write(value - _lost(self._numbers[name], gone))
        return model

    def _pruned(self, model: nn.Module, keep: Mapping[str, int]) -> nn.Module:
        plan = Plan()
        for root, group in self._groups.items():
            gone = group.units - keep.get(root, group.units)
            if gone:
                plan += plan_removal(model, group, range(gone), "its cost is asked for", plan)
        return applied(model, plan)

    def _gone(self, keep: Mapping[str, int]) -> dict[str, int]:
        return {root: group.units - keep.get(root, group.units) for root, group in self._groups.items()}

    def _learn(self, model: nn.Module, example: Dataset) -> bool:
        """Find out what depends on which width from two networks with different numbers of units gone; return whether that explains them."""
        widths = [_probe(list(self._groups.values()), turn) for turn in (0, 1)]
        files = [exported_model(self._pruned(model, keep), example) for keep in widths]
        return self._explain_numbers([self._gone(keep) for keep in widths], files) and all(
            _same_form(self.at(keep), file) for keep, file in zip(widths, files, strict=True)
        )

    def _explain_numbers(self, gone: Sequence[Mapping[str, int]], files: Sequence[Any]) -> bool:
        """Attribute every integer that differs from the dense file to the groups whose units it counts; False where none fit."""
        dense = {name: value for name, value, _ in _numbers(self._dense)}
        found = [{name: value for name, value, _ in _numbers(file)} for file in files]
        if any(set(values) != set(dense) for values in found):
            return False
        widths = [share for shares in self._sizes.values() for share in shares if share]
        for name, value in dense.items():
            lost = [value - values[name] for values in found]
            if any(lost):
                share = _explanation(lost, gone, widths)
                if share is None:
                    return False
                self._numbers[name] = share
        return True


def _explanation(lost: Sequence[int], gone: Sequence[Mapping[str, int]], widths: Sequence[Share]) -> Share | None:
    """Return what makes up the loss of an integer in every network: a width of some layer, or else the units of a few groups; None if neither.

    Args:
        lost: by which the integer fell, per network.
        gone: units that each network lost, by group.
        widths: what the layers' widths lose.
    """
    alike = (dict.fromkeys(roots, 1) for many in range(1, MOST_GROUPS + 1) for roots in combinations(gone[0], many))
    for share in chain(widths, alike):
        per = lost[0] // _lost(share, gone[0])
        if per and all(count == per * _lost(share, units) for count, units in zip(lost, gone, strict=True)):
            return {root: per * each for root, each in share.items()}
    return None


def _probe(groups: Sequence[Group], turn: int) -> dict[str, int]:
    """Return widths that remove a different number of units from each group, as far as there are enough of them."""
    order = list(groups) if turn == 0 else list(reversed(groups))
    return {group.root: group.units - (1 + (number + turn) % (group.units - 1)) for number, group in enumerate(order)}


def _lost(share: Share, gone: Mapping[str, int]) -> int:
    return sum(per * gone[root] for root, per in share.items())


def _shares_by_name(model: nn.Module, groups: Sequence[Group], exported: Any) -> dict[str, list[Share]]:
    """Return what each constant's axes lose, for constants that carry the name of a parameter or its values, transposed or not."""
    wanted: dict[tuple[str, str], dict[int, dict[str, int]]] = {}
    for group in groups:
        for member in group.members:
            layer: Any = model.get_submodule(member.module)
            for parameter, dim in slice_dimensions(layer, member.kind):
                axes = wanted.setdefault((member.module, parameter), {})
                axes.setdefault(dim, {})[group.root] = member.index.shape[1]
        for slot in group.slots:
            wanted.setdefault((slot.module, slot.parameter), {}).setdefault(slot.dim, {})[group.root] = 1
    values = {
        (module, parameter): np.asarray(tensor.detach().cpu().numpy())
        for module, parameter in wanted
        if (tensor := getattr(model.get_submodule(module), parameter, None)) is not None
    }
    shares: dict[str, list[Share]] = {}
    for constant in exported.graph.initializer:
        module, _, parameter = constant.name.rpartition(".")
        if (module, parameter) in values and tuple(constant.dims) == values[module, parameter].shape:
            axes = wanted[module, parameter]
            shares[constant.name] = [axes.get(axis, {}) for axis in range(len(constant.dims))]
        elif parameter == "weight_bias" and (module, "weight") in wanted:
            # A normalisation that was folded into the layer leaves this.
            shares[constant.name] = [wanted[module, "weight"].get(0, {})]
        elif len(constant.dims) == 2 and constant.name not in shares:
            array = numpy_helper.to_array(constant)
            for key, value in values.items():
                if value.shape == array.shape[::-1] and np.array_equal(value.T, array):
                    shares[constant.name] = [wanted[key].get(axis, {}) for axis in (1, 0)]
                    break
    return shares


def _numbers(model: Any) -> Iterator[tuple[str, int, Any]]:
    """Yield every integer in a file that may depend on widths, with its place and a function that replaces it."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and np.prod(tensor.dims) <= 64:
            array = numpy_helper.to_array(tensor).copy()
            for position in range(array.size):

                def write(value: int, tensor: Any = tensor, position: int = position) -> None:
                    fresh = numpy_helper.to_array(tensor).copy()
                    fresh.flat[position] = value
                    tensor.CopyFrom(numpy_helper.from_array(fresh, tensor.name))

                yield f"{tensor.name}[{position}]", int(array.flat[position]), write
    for number, node in enumerate(model.graph.node):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INT:

                def write_attribute(value: int, attribute: Any = attribute) -> None:
                    attribute.i = value

                yield f"{number}.{attribute.name}", int(attribute.i), write_attribute


def _same_form(first: Any, second: Any) -> bool:
    """Tell whether two files have the same nodes, the same sizes of constants and the same integers."""
    nodes = [
        [(node.op_type, tuple(node.input), tuple(node.output)) for node in model.graph.node]
        for model in (first, second)
    ]
    sizes = [{tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer} for model in (first, second)]
    numbers = [[(name, value) for name, value, _ in _numbers(model)] for model in (first, second)]
    return nodes[0] == nodes[1] and sizes[0] == sizes[1] and numbers[0] == numbers[1]
