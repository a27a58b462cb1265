"""The examples of a role: from what a recipe says of it to a data set.

A run, a bundle of it and the check of two files read data the same way, so that they mean the same examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateurs.recipe import DataSpec, Recipe, settings_from

if TYPE_CHECKING:
    from secateurs.data import Dataset
    from secateurs.manager import Manager

__all__ = ["evaluation_examples", "load_examples", "load_role"]


def load_examples(spec: DataSpec, where: str, manager: Manager, *, network: str | None = None) -> Dataset:
    """Return all the examples of a source; `spec.samples` is left to the caller, as roles are made disjoint first.

    Args:
        spec: the source and its options.
        where: what messages call the specification, for example `data.evaluation`.
        manager: of the plugins that register sources.
        network: a Hugging Face network whose processor is taken where the source needs one and none is named.

    Raises:
        RecipeError: an unknown source or option, or a value that is not allowed.
        DataError: the source is missing, malformed or empty.
    """
    entry = manager.registries.datasets[spec.source]
    model, options = entry.load_settings(), dict(spec.options)
    if network is not None and model is not None and "processor" in model.model_fields:
        options.setdefault("processor", network)
    return entry.load()(settings_from(model, options, where))


def load_role(recipe: Recipe, role: str, manager: Manager) -> Dataset:
    """Return all the examples that a recipe names for a role it has; errors as for `load_examples`."""
    network = recipe.model.value if recipe.model.loader == "hf" else None
    return load_examples(recipe.data[role], f"data.{role}", manager, network=network)


def evaluation_examples(recipe: Recipe, manager: Manager) -> Dataset | None:
    """Return the examples that a run of the recipe is judged on, or None where it names none; errors as for `load_examples`."""
    spec = recipe.data.get("evaluation")
    return None if spec is None else load_role(recipe, "evaluation", manager).sampled(spec.samples, recipe.seed)
