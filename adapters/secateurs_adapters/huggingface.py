"""Folders that plain `from_pretrained` reloads: a pruned Hugging Face network written without a trace of the pruning.

A configuration describes a network by a few numbers: how many layers, one width for all feed-forwards, heads. The numbers are found by
building the network that a configuration describes and comparing its tensors' shapes with the pruned ones; dropped layers are left out and the
others move up. What no configuration describes is refused, because `from_pretrained` fails on it, or loads it wrong.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.attention import describe
from secateurs.errors import ModelError
from secateurs.forward import frozen_randomness, inference, output_tensors
from secateurs.layers import widths_of
from secateurs.plan import DropBlock, Plan
from secateurs.surgery import Bypass

__all__ = ["save_pretrained"]

LISTED = 4
"""Tensors that a refusal lists at the most."""
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
_PER_LAYER = ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers")
_FEED_FORWARD = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "d_ff",
    "hidden_dim",
    "ffn_hidden_size",
)
_REBUILD = "Keep plan.json with the weights and rebuild the network with `secateurs.load`."
_REMEDY = (
    "A configuration holds one width for all layers. Prune with `uniform: true` (and `heads: false` where the configuration ties the heads to "
    "the hidden size), or keep plan.json with the weights and rebuild the network with `secateurs.load`."
)

Shapes = Mapping[str, tuple[int, ...]]
Change = Mapping[str, Any]


def save_pretrained(
    model: nn.Module, plan: Plan, folder: str | Path, *, inputs: Mapping[str, Tensor] | None = None
) -> None:
    """Write a pruned Hugging Face network so that plain `from_pretrained(folder)` reloads exactly this function.

    The folder is written whole or not at all, after it was reloaded and compared with `model` bit by bit.

    Args:
        model: the pruned `transformers.PreTrainedModel`, dropped layers bypassed; it is not changed.
        plan: the edits that lead to it.
        folder: new or empty.
        inputs: what to compare outputs on, by name; None makes seeded token ids or pixels.

    Raises:
        ModelError: it is no Hugging Face network, no configuration describes it, or the reloaded network differs.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is no transformers.PreTrainedModel; save it with `PruneResult.save` and rebuild it with `secateurs.load`."
        )
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelError(f"the folder {str(folder)!r} is not empty; give a new one, so that no old weights stay in it.")
    given = _seeded_inputs(model) if inputs is None else inputs
    expected = _outputs(model, given)
    uniform = _rebuilt(model, _kept_entries(model, plan))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as partial:
        written = Path(partial) / folder.name
        _check(model, _round_trip(uniform, written, model.config._attn_implementation), given, expected)
        if folder.exists():
            folder.rmdir()
        written.rename(folder)


# --- layers -----------------------------------------------------------------------------------------------------------------------------


def _kept_entries(model: nn.Module, plan: Plan) -> dict[str, list[int]]:
    """Return, for each list that lost layers, the numbers of those that are left."""
    dropped = {edit.path for edit in plan.of(DropBlock)}
    found = {path for path, module in model.named_modules() if isinstance(module, Bypass)}
    if dropped != found:
        raise ModelError(
            f"the plan drops {sorted(dropped) or 'nothing'}, the network has {sorted(found) or 'nothing'} bypassed; give the plan that "
            f"belongs to this network, and the network without other changes."
        )
    lists = sorted({path.rpartition(".")[0] for path in dropped})
    for path in lists:
        if not isinstance(model.get_submodule(path), nn.ModuleList):
            inside = sorted(other for other in dropped if other.rpartition(".")[0] == path)
            raise ModelError(
                f"{inside[0]!r} was dropped, and it is not an entry of a torch.nn.ModuleList that could become shorter. {_REBUILD}"
            )
    return {
        path: [int(name) for name, child in model.get_submodule(path).named_children() if not isinstance(child, Bypass)]
        for path in lists
    }


def _moved_up(name: str, lists: Mapping[str, list[int]]) -> str:
    """Return the name of a tensor after the dropped entries of all lists are gone."""
    for path, kept in lists.items():
        if name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            return f"{path}.{kept.index(int(number))}.{rest}"
    return name


# --- the configuration ------------------------------------------------------------------------------------------------------------------


def _rebuilt(model: Any, lists: Mapping[str, list[int]]) -> Any:
    """Return an ordinary network of the same class with the weights of `model`."""
    state = {_moved_up(name, lists): tensor for name, tensor in model.state_dict().items()}
    config = _fitted(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, lists)
    with frozen_randomness(0):
        network = type(model)(config).to(model.dtype)
    network.load_state_dict(state, strict=True)
    if hasattr(model, "generation_config"):
        network.generation_config = copy.deepcopy(model.generation_config)
    return network.eval()


def _fitted(model: Any, wanted: Shapes, lists: Mapping[str, list[int]]) -> Any:
    """Return the configuration of a network with the wanted shapes: while a change of one thing helps, the most helpful is made."""
    config = copy.deepcopy(model.config)
    obtained = _shapes(type(model), config)
    while left := _mismatches(wanted, obtained):
        trials = []
        for change in _changes(model, config, wanted, obtained, lists):
            trial = copy.deepcopy(config)
            try:
                for name, value in change.items():
                    setattr(trial, name, value)
                shapes = _shapes(type(model), trial)
            except Exception:  # noqa: S112 - whatever transformers raises, no network has such a configuration
                continue
            trials.append((_mismatches(wanted, shapes), trial, shapes))
        best = min(trials, key=lambda item: item[0], default=None)
        if best is None or best[0] >= left:
            raise ModelError(_not_uniform(model, wanted, obtained, lists))
        _, config, obtained = best
    return config


def _shapes(kind: Any, config: Any) -> Shapes:
    with torch.device("meta"):
        state = kind(copy.deepcopy(config)).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _mismatches(wanted: Shapes, obtained: Shapes) -> int:
    return len(set(wanted.items()) ^ set(obtained.items()))


def _changes(
    model: nn.Module, config: Any, wanted: Shapes, obtained: Shapes, lists: Mapping[str, list[int]]
) -> Iterator[Change]:
    """Yield the changes of the configuration that could bring it nearer."""
    for path, kept in lists.items():
        before = len(model.get_submodule(path))  # type: ignore[arg-type]  # `_kept_entries` checked that it is a list
        cut = {
            name: [value[index] for index in kept]
            for name in _PER_LAYER
            if isinstance(value := getattr(config, name, None), list) and len(value) == before
        }
        for name in _COUNTS:
            if getattr(config, name, None) == before:
                yield {name: len(kept), **cut}
    sizes: set[int] = set()
    for name in wanted.keys() & obtained:
        sizes |= {new for new, old in zip(wanted[name], obtained[name], strict=False) if new != old}
    hidden = getattr(config, "hidden_size", 0)
    for size in sorted(sizes):
        for name in _FEED_FORWARD:
            if hasattr(config, name):
                yield {name: size}
        if hasattr(config, "mlp_ratio") and hidden:
            yield {"mlp_ratio": size / hidden if size % hidden else size // hidden}
    yield from _head_changes(model, config)


def _head_changes(model: nn.Module, config: Any) -> Iterator[Change]:
    """Yield the numbers of heads that the projections have, with the width of a head made explicit."""
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None)
    if not isinstance(heads, int):
        return
    width = width or getattr(config, "hidden_size", 0) // heads
    found = set()
    for module in model.modules():
        description = describe(module)
        if description is not None and width:
            found.add(
                tuple(
                    widths_of(module.get_submodule(name))[1] // width
                    for name in (description.queries, description.keys)
                )
            )
    for queries, keys in sorted(found):
        change = {"num_attention_heads": queries, "head_dim": width}
        yield {**change, "num_key_value_heads": keys} if hasattr(config, "num_key_value_heads") else change


def _not_uniform(model: Any, wanted: Shapes, obtained: Shapes, lists: Mapping[str, list[int]]) -> str:
    """Say which tensors no configuration describes, under the names that they have in the pruned network, and what to do."""
    own = {_moved_up(name, lists): name for name in model.state_dict()}
    odd: dict[str, list[str]] = {}
    for name in sorted(wanted):
        odd.setdefault(_pattern(name), []).append(name)
    odd = {pattern: names for pattern, names in odd.items() if any(wanted[n] != obtained.get(n) for n in names)}
    parts, fixed = [], set[str]()
    for pattern, names in odd.items():
        layers: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            layers.setdefault(wanted[name], []).append(", ".join(re.findall(r"(?<=\.)\d+(?=\.)", own[name])))
        where = " and ".join(
            f"{shape}" + (f" in {'; '.join(some)}" if any(some) else "") for shape, some in layers.items()
        )
        expected = sorted({obtained[name] for name in names if name in obtained})
        tells = "" if len(layers) > 1 else f" where the configuration gives {_listed(expected)}"
        parts.append(f"{pattern} is {where}{tells}")
        if len(layers) == 1 and expected and expected[0][:1] != next(iter(layers))[:1]:
            fixed.add(pattern.rpartition(".")[0])
    parts += [f"{name} is missing" for name in sorted(obtained.keys() - wanted.keys())][:1]
    more = f", and {len(parts) - LISTED} more" if len(parts) > LISTED else ""
    leave = f" Leave alone what no configuration describes: `ignored_layers: {_quoted(fixed)}`." if fixed else ""
    said = "; ".join(parts[:LISTED])
    return (
        f"no {type(model.config).__name__} describes the pruned {type(model).__name__}: {said}{more}. {_REMEDY}{leave}"
    )


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(f"{shape}" for shape in shapes) or "none"


def _quoted(names: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in sorted(names)) + "]"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


# --- the proof --------------------------------------------------------------------------------------------------------------------------


def _round_trip(network: Any, folder: Path, attention: str) -> Any:
    """Write a network and reload it as its user will, with the attention kernel that the pruned one has."""
    try:
        network.save_pretrained(folder)
        return type(network).from_pretrained(folder, dtype=network.dtype, attn_implementation=attention)
    except Exception as error:  # whatever transformers raises here, its user would meet
        raise ModelError(
            f"the pruned {type(network).__name__} does not come back through `from_pretrained` ({_said(error)}). {_REBUILD}"
        ) from error


def _said(error: Exception) -> str:
    """Return what an error says; transformers 5 hides the reason in the error's cause."""
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


def _check(model: Any, reloaded: Any, inputs: Mapping[str, Tensor], expected: list[Tensor]) -> None:
    """Compare what was reloaded with the pruned network, bit by bit."""
    got = _outputs(reloaded.to(model.device), inputs)
    if len(expected) != len(got) or not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        raise ModelError(
            f"the pruned {type(model).__name__} computes something else after `from_pretrained`, although all shapes fit: its layers depend on "
            f"their number, or on attributes that no configuration holds. {_REBUILD}"
        )


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    device = next(model.parameters()).device
    try:
        with inference(model):
            return output_tensors(model(**{name: value.to(device) for name, value in inputs.items()}))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the inputs {sorted(inputs)} that its saved form is compared on "
            f"({_said(error)}); give fitting ones as `inputs`."
        ) from error


def _seeded_inputs(model: Any) -> dict[str, Tensor]:
    config, name = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, generator=generator, dtype=torch.float32).to(model.dtype)}
    if name == "input_ids":
        names = [name, "decoder_input_ids"] if config.is_encoder_decoder else [name]
        vocabulary = config.get_text_config().vocab_size
        return {each: torch.randint(0, vocabulary, (2, 8), generator=generator) for each in names}
    raise ModelError(f"no inputs can be made for {type(model).__name__}, which reads {name!r}; give some as `inputs`.")
