"""Hugging Face networks by name or folder: `model: {hf: ..., task: ...}` of a recipe.

Weights are read from safetensors alone and code from nowhere: a checkpoint that is a pickle, or that needs its own
Python files, is refused. So is one that lacks weights of the task, because those would be random.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateurs import checkpoint
from secateurs.errors import ModelError
from secateurs.recipe import settings_from
from secateurs_adapters.hf_settings import HfModelSettings
from secateurs_adapters.models import load_weights

__all__ = ["FOLDER", "load_hf", "load_pruned", "quiet"]

FOLDER = "huggingface"
"""The folder of a run's output that transformers reads."""
LISTED = 6
"""Weights that a refusal lists at the most."""
_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def load_hf(value: str, *, arguments: Mapping[str, Any], weights: Path | None, folder: Path) -> nn.Module:  # noqa: ARG001
    """Return a Hugging Face network in evaluation mode; implements `secateurs.interfaces.ModelLoader`.

    Args:
        value: a name on the hub, a folder with `config.json`, or the output folder of a run.
        arguments: see `HfModelSettings`.
        weights: a safetensors file to load strictly instead of the checkpoint's own.
        folder: the recipe's folder; not used.

    Raises:
        ModelError: there is no such network, it is no safetensors checkpoint, it needs code of its own, or weights of
            the task are missing.
        RecipeError: an unknown argument.
    """
    settings: HfModelSettings = settings_from(HfModelSettings, arguments, "model.arguments")
    source = _plain_folder(value)
    config = _config(source, settings)
    auto = _class(config, settings, source)
    if weights is not None or not settings.pretrained:
        network = _random(auto, config, settings)
        if weights is not None:
            load_weights(network, weights)
        return network.eval()
    return _pretrained(auto, config, settings, source).eval()


def load_pruned(folder: str | Path) -> nn.Module:
    """Rebuild the pruned Hugging Face network that a run left, whatever its shapes, in evaluation mode and the precision it was saved in.

    Where a configuration describes it, `from_pretrained(folder + "/huggingface")` does the same without Secateurs.

    Args:
        folder: the output folder of `secateurs run`.

    Raises:
        ModelError: no pruned Hugging Face network is there.
        PlanError: the plan does not fit the configuration.
    """
    home = Path(folder)
    if not (home / FOLDER / "config.json").is_file() or not (home / checkpoint.PLAN).is_file():
        raise ModelError(
            f"{str(home)!r} holds no pruned Hugging Face network: {FOLDER}/config.json or {checkpoint.PLAN} is missing. "
            f"Give the output folder of `secateurs run`."
        )
    settings = HfModelSettings(pretrained=False)
    source = str(home / FOLDER)
    config = _config(source, settings)
    auto = _class(config, settings, source)
    if (home / FOLDER / checkpoint.WEIGHTS).is_file():
        return _pretrained(auto, config, settings, source, dtype="auto").eval()
    return _as_saved(checkpoint.load(home, build=_random(auto, config, settings)), home / checkpoint.WEIGHTS)


def _as_saved(network: nn.Module, weights: Path) -> nn.Module:
    """Give tensors that were loaded in float32 the types that they have in the file; all of its types fit into float32."""
    from safetensors import safe_open

    held = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            held[name].data = held[name].data.to(file.get_tensor(name).dtype)
    network.config.dtype = network.dtype
    return network


def _plain_folder(value: str) -> str:
    """Return what transformers reads: of a run's output folder, the part that is for it."""
    home = Path(value)
    if not (home / checkpoint.PLAN).is_file() or not (home / FOLDER / "config.json").is_file():
        return value
    if (home / FOLDER / checkpoint.WEIGHTS).is_file():
        return str(home / FOLDER)
    raise ModelError(
        f"{value!r} holds a pruned network that no configuration describes, so a recipe cannot start from it. Start from "
        f"the original and put all passes into one recipe; `secateurs_adapters.hf_models.load_pruned` rebuilds it in a script."
    )


def _config(source: str, settings: HfModelSettings) -> Any:
    import transformers

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                source, revision=settings.revision or "main", trust_remote_code=False
            )
    except Exception as error:  # transformers raises nearly anything here
        raise ModelError(
            f"no configuration of a network at {source!r}: {_said(error)} Give a folder with config.json, relative to the "
            f"working directory, or a name on the hub (cached, or with access to it); code of a checkpoint is never run."
        ) from error
    for name, value in settings.config.items():
        if not hasattr(config, name):
            raise ModelError(
                f"`model.arguments.config`: {type(config).__name__} has no {name!r}; see config.json of {source!r}."
            )
        setattr(config, name, value)
    if hasattr(config, "use_cache") and "use_cache" not in settings.config:
        # A cache is memory for generation; in a forward pass it is only more outputs.
        config.use_cache = False
    return config


def _class(config: Any, settings: HfModelSettings, source: str) -> Any:
    """Return the class that builds the network: of the task, or the one that the configuration names."""
    import transformers

    if settings.task is not None:
        return getattr(transformers, _AUTO[settings.task])
    named = list(getattr(config, "architectures", None) or [])
    found = getattr(transformers, named[0], None) if len(named) == 1 else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(
            f"the configuration at {source!r} names {', '.join(named) or 'no class'}, which transformers "
            f"{transformers.__version__} cannot build; give `task`: {', '.join(_AUTO)}."
        )
    return found


def _random(auto: Any, config: Any, settings: HfModelSettings) -> nn.Module:
    try:
        with quiet():
            if hasattr(auto, "from_config"):
                network = auto.from_config(config, trust_remote_code=False, **_how(settings))
            else:
                network = auto._from_config(config, **_how(settings))
    except Exception as error:
        raise ModelError(f"{auto.__name__} cannot be built from its configuration: {_said(error)}") from error
    assert isinstance(network, nn.Module)
    return network


def _pretrained(auto: Any, config: Any, settings: HfModelSettings, source: str, **how: Any) -> nn.Module:
    try:
        with quiet():
            network, told = auto.from_pretrained(
                source,
                config=config,
                revision=settings.revision or "main",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **{**_how(settings), **how},
            )
    except Exception as error:
        raise ModelError(
            f"the weights at {source!r} cannot be loaded: {_said(error)} Only safetensors are read, as a pickle can run "
            f"code; convert one with `AutoModel.from_pretrained(...).save_pretrained(FOLDER)` where you trust it, or set "
            f"`arguments: {{pretrained: false}}`."
        ) from error
    lacking = sorted({*told["missing_keys"], *(str(item) for item in told["mismatched_keys"])})
    if lacking:
        more = f", and {len(lacking) - LISTED} more" if len(lacking) > LISTED else ""
        raise ModelError(
            f"the checkpoint {source!r} lacks {len(lacking)} weights of {type(network).__name__}: "
            f"{', '.join(lacking[:LISTED])}{more}. They would be random: choose the `task` that it was trained for, or "
            f"fine-tune it first."
        )
    assert isinstance(network, nn.Module)
    return network


def _how(settings: HfModelSettings) -> dict[str, Any]:
    import torch

    chosen: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    return chosen if settings.attention is None else {**chosen, "attn_implementation": settings.attention}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the advice and the progress bars of transformers off the terminal; what matters is checked and raised."""
    from transformers.utils import logging as told

    level, shown = told.get_verbosity(), told.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            told.set_verbosity(logging.CRITICAL)
            told.disable_progress_bar()
            yield
        finally:
            told.set_verbosity(level)
            if shown:
                told.enable_progress_bar()


def _said(error: Exception) -> str:
    """Return what an error says, in a line; transformers 5 hides the reason in the error's cause."""
    text = " ".join(str(error.__cause__ or error).split())
    return f"{type(error).__name__}: {text[:400]}".rstrip(": .") + "."
