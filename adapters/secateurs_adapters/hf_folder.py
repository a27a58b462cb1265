"""The `huggingface/` folder of a run: what transformers needs of a pruned network, and a model card for the hub.

Where a configuration describes the pruned network, plain `from_pretrained` reloads it from there. Where none does, the
folder has the original configuration and no weights, so that `from_pretrained` fails at once instead of loading something
else, and `secateurs_adapters.hf_models.load_pruned` rebuilds the network from the plan beside it.

The run's own folder has weights that fit no configuration, and where config.json is missing transformers 4 guesses one from
the folder's name or takes the class's defaults; layers that were dropped would then be filled up at random. A config.json
that is no JSON makes it fail there.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from secateurs import checkpoint
from secateurs.errors import ModelError, PlanError
from secateurs.files import plain_json, read_file, write_text
from secateurs.forward import frozen_randomness, tensors
from secateurs.surgery import apply_plan
from secateurs_adapters.hf_models import FOLDER, quiet
from secateurs_adapters.huggingface import save_pretrained

if TYPE_CHECKING:
    from secateurs.data import Dataset
    from secateurs.plan import Plan

__all__ = ["write_card", "write_folder"]

REFUSAL = """This is not a configuration, so that `from_pretrained` fails here instead of filling up a pruned network at random.
See huggingface/README.md, or use `secateurs_adapters.hf_models.load_pruned` on this folder.
"""
_PROCESSORS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""The files of tokenizers, image processors and feature extractors, which are copied as they are."""


def write_folder(model: nn.Module, plan: Plan, folder: Path, example: Dataset | None = None) -> str | None:
    """Write `folder/huggingface` for a pruned network; implements `secateurs.hookspecs.secateurs_save_model`.

    Args:
        model: the pruned network; nothing is written for one that is no `transformers.PreTrainedModel`.
        plan: the edits that lead to it.
        folder: where plan.json and model.safetensors lie.
        example: what the reloaded network is compared on; None makes seeded token ids or pixels.

    Returns:
        How the network is reloaded, in a sentence; None where nothing was written.
    """
    if not _is_ours(model):
        return None
    target = folder / FOLDER
    if (target / checkpoint.MARK).is_file():
        shutil.rmtree(target)
    if target.exists():
        return f"`{FOLDER}/` was there before the run and was left alone, so nothing was written for transformers"
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", suffix=".partial", dir=folder) as partial:
        made = Path(partial) / FOLDER
        reason = _write_network(model, plan, made, example)
        source = str(getattr(model.config, "_name_or_path", "") or "")
        body = {"plain": reason is None, "reason": reason, "source": source, "class": type(model).__name__}
        _copy_processors(source, made)
        write_text(made / checkpoint.MARK, json.dumps(body, indent=2) + "\n")
        write_text(folder / "config.json", REFUSAL)
        made.rename(target)
    if reason is None:
        return f"`from_pretrained` of transformers reloads the network from `{FOLDER}/`"
    return f"`from_pretrained` cannot hold the network ({reason}); `{FOLDER}/` has no weights for it, so that it fails"


def write_card(folder: Path) -> None:
    """Write the model card of `folder/huggingface`, where there is one: the run's card, with what the hub reads."""
    mark = folder / FOLDER / checkpoint.MARK
    if not mark.is_file():
        return
    told = plain_json(read_file(mark, "mark", ModelError), f"the mark {str(mark)!r}", ModelError)
    card = folder / "README.md"
    figures = (
        card.read_text(encoding="utf-8").partition("## How to use it")[0] if card.is_file() else "# Pruned network\n\n"
    )
    head = ["---", "library_name: transformers", "tags: [secateurs, pruned]"]
    if told["source"] and not Path(told["source"]).exists():
        head.append(f"base_model: {json.dumps(told['source'])}")
    head.append("---")
    write_text(mark.parent / "README.md", "\n".join([*head, "", figures + _usage(told)]))


def _is_ours(model: nn.Module) -> bool:
    # A network of transformers cannot exist before transformers was imported.
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _write_network(model: Any, plan: Plan, folder: Path, example: Dataset | None) -> str | None:
    """Write weights and configuration, or the original configuration alone; return why, in the second case."""
    inputs = None if example is None else dict(tensors(example.take(range(min(2, len(example))))))
    try:
        with quiet():
            save_pretrained(model, plan, folder, inputs=inputs)
        return None
    except ModelError as error:
        reason = " ".join(str(error).split())
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    _check_rebuilt(model, plan, config)
    folder.mkdir()
    with quiet():
        config.save_pretrained(folder)
    return reason


def _check_rebuilt(model: Any, plan: Plan, config: Any) -> None:
    """Check that configuration and plan give the pruned network's structure."""
    try:
        with frozen_randomness(0), quiet():
            rebuilt = apply_plan(type(model)(copy.deepcopy(config)), plan)
    except PlanError as error:
        raise ModelError(
            f"the plan does not lead from the configuration of {type(model).__name__} to the pruned network ({error}); start "
            f"from the original network, not from a pruned one."
        ) from error
    shapes = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (model, rebuilt)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ModelError(
            f"the plan does not lead from the configuration of {type(model).__name__} to the pruned network ({odd!r} differs); "
            f"start from the original network, not from a pruned one."
        )


def _copy_processors(source: str, folder: Path) -> None:
    """Copy tokenizer and processor files from where the network came from, if they are on this machine."""
    from transformers.utils.hub import cached_file

    for name in _PROCESSORS if source else ():
        try:
            with quiet():
                found = cached_file(
                    source,
                    name,
                    local_files_only=True,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_connection_errors=False,
                )
        except (OSError, ValueError):  # neither a folder nor a name that is cached here
            return
        if found is not None:
            shutil.copyfile(found, folder / name)


def _usage(told: dict[str, Any]) -> str:
    if told["plain"]:
        how = f'from transformers import {told["class"]}\n    model = {told["class"]}.from_pretrained("THIS_FOLDER")'
        return f"## How to use it\n\n    {how}\n"
    how = 'from secateurs_adapters.hf_models import load_pruned\n    model = load_pruned("RUN_FOLDER")'
    return (
        f"## How to use it\n\n    {how}\n\nRUN_FOLDER is the folder above this one, with plan.json and model.safetensors. Plain "
        f"`from_pretrained` fails, because {told['reason']}\n"
    )
