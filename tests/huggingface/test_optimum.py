"""What Optimum makes of pruned networks: its exporter, and its classes that run the file."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny_hf import pictures

import secateurs
from secateurs import cost
from secateurs.forward import to_dataset
from secateurs_adapters.hf_folder import write_folder

pytestmark = pytest.mark.filterwarnings("ignore")

try:
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTModelForImageClassification, ORTModelForSequenceClassification
except ImportError as error:
    pytest.skip(f"needs the extra `optimum`, which takes transformers below 4.58: {error}", allow_module_level=True)

from secateurs_adapters.optimum_export import OptimumExporter  # noqa: E402

DEPTH = {"cka-cluster": {"threshold": 0.0, "max_blocks": 1, "tolerance": 1.0}}
WIDTH = {"magnitude": {"target_units": 0.6, "allocation": "measured", "grid": 2, "refit": "none"}}


def sentences(count, length):
    """Return padded token ids by input name; each sentence is shorter than the one before."""
    ids = torch.tensor(np.random.default_rng(length).integers(5, 15, (count, length)))
    mask = (torch.arange(length)[None] < length - torch.arange(count)[:, None] % 4).long()
    return {"input_ids": ids * mask, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


def pixels(folder, count, seed):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return dict(processor(pictures(count, seed), return_tensors="pt"))


def pruned(network, example, passes, folder):
    """Prune a network, and save it as a run does."""
    batch = {name: value.clone() for name, value in example.items()}
    result = secateurs.prune(network, batch, [batch], passes, evaluate=lambda _: 1.0)
    before, after = cost.total(cost.parameters(network)), cost.total(cost.parameters(result.model))
    assert after < 0.95 * before
    result.save(folder)
    write_folder(result.model, result.plan, folder, to_dataset(batch))
    return result


def agree(runs, model, inputs):
    """Compare the logits of Optimum's class with those of the torch network."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
    assert expected.std(0).min() > 1e-2, "the outputs would agree whatever the inputs are"
    torch.testing.assert_close(runs(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["bert", "vit"])
def case(request):
    """Return a network, Optimum's class that runs it, its task, and a function of a number and a size to inputs."""
    source = request.getfixturevalue(request.param)
    if request.param == "bert":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(source)
        return model, ORTModelForSequenceClassification, "text-classification", sentences
    model = transformers.AutoModelForImageClassification.from_pretrained(source)
    return model, ORTModelForImageClassification, "image-classification", lambda n, size: pixels(source, n, size)


def test_optimum_exports_the_saved_folder_and_runs_it(tmp_path, case):
    network, runs, task, inputs = case
    result = pruned(network, inputs(16, 12), [DEPTH], tmp_path / "out")
    main_export(str(tmp_path / "out" / "huggingface"), tmp_path / "onnx", task=task, do_validation=False)
    loaded = runs.from_pretrained(tmp_path / "onnx")
    assert loaded.config.num_hidden_layers == 3
    for count, size in ((2, 5), (4, 9)):
        agree(loaded, result.model, inputs(count, size))


def test_our_exporter_writes_what_optimum_runs_where_no_configuration_describes_the_network(tmp_path, case):
    network, runs, _, inputs = case
    result = pruned(network, inputs(16, 12), [DEPTH, WIDTH], tmp_path / "out")
    folder = tmp_path / "out" / "huggingface"
    with pytest.raises(OSError, match="no file named"):
        type(network).from_pretrained(folder)
    OptimumExporter()(result.model.eval(), to_dataset(inputs(16, 12)), folder / "model.onnx", opset=18)
    loaded = runs.from_pretrained(folder)
    for count, size in ((2, 5), (4, 9)):
        agree(loaded, result.model, inputs(count, size))
