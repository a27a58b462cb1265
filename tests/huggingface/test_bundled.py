"""What a bundle takes along of a run on a Hugging Face network."""

from __future__ import annotations

import numpy as np
import yaml

from secateurs.manager import create_manager
from secateurs.recipe import load_recipe
from secateurs.runner import prepare
from secateurs_adapters.bundle_command import _bundled_data


def test_the_networks_own_processor_reads_the_examples(tmp_path, bert, reviews):
    role = {"source": "hf", "dataset": str(reviews), "text": "sentence", "max_length": 12}
    body = {
        "seed": 5,
        "model": {"hf": str(bert), "task": "text-classification"},
        "data": {"calibration": {**role, "split": "train"}, "evaluation": {**role, "split": "test", "samples": 11}},
        "passes": [{"magnitude": {"target_units": 0.9}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    judged = prepare(load_recipe(tmp_path / "recipe.yaml"), create_manager()).evaluation
    taken, metric = _bundled_data(tmp_path, None)
    assert judged is not None
    assert taken is not None
    assert (metric, len(taken)) == ("accuracy", 11)
    assert taken.inputs.keys() == judged.inputs.keys()
    assert all(np.array_equal(taken.inputs[name], judged.inputs[name]) for name in judged.inputs)
    assert np.array_equal(taken.labels, judged.labels)
