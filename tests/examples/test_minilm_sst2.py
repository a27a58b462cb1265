"""The example's parts on a tiny BERT with MiniLM's tokenizer: fine-tuning learns, and the recipe prunes what it wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

minilm = pytest.importorskip("minilm_sst2")
transformers = pytest.importorskip("transformers")

from secateurs.manager import create_manager  # noqa: E402 - after the skip
from secateurs.pipeline import run_passes  # noqa: E402
from secateurs.recipe import load_recipe, parse_pass  # noqa: E402
from secateurs.runner import prepare  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GOOD, BAD = (
    ("a fine film", "warm and funny", "a joy to watch"),
    ("a dull film", "cold and tedious", "a chore to sit through"),
)
SENTENCES = [(f"{text} , number {number}", int(text in GOOD)) for number in range(20) for text in (*GOOD, *BAD)]

pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(
        importlib.util.find_spec(minilm.PACKAGE) is None, reason=f"the package {minilm.PACKAGE} is not installed"
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder like that inside the package, with a network of two narrow layers."""
    folder = tmp_path_factory.mktemp("tiny")
    transformers.AutoTokenizer.from_pretrained(minilm.package_folder()).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_minilm_has_the_size_that_everybody_knows():
    network = minilm.build(str(minilm.package_folder()))
    assert sum(parameter.numel() for parameter in network.bert.parameters()) == 22_713_216
    assert len(network.bert.encoder.layer) == 6
    assert network.classifier.out_features == 2


def test_the_parts_of_the_sentences_share_no_text():
    sentences = [(f"text {number % 90}", 0) for number in range(100)]
    learn, decide = minilm.split(sentences)
    assert len(decide) == 10
    assert not {text for text, _ in learn} & {text for text, _ in decide}
    assert {text for text, _ in learn + decide} == {text for text, _ in sentences}
    assert minilm.split(sentences) == (learn, decide)


def test_a_table_is_read_as_it_was_written(tmp_path):
    (tmp_path / "some.tsv").write_text("a b\t1\n\nc\td\t0\n", encoding="utf-8")
    assert minilm.read(tmp_path / "some.tsv") == [("a b", 1), ("c\td", 0)]


def test_the_example_is_fine_tuned_pruned_and_reloaded(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(minilm, "package_folder", lambda: tiny)
    output = tmp_path / "weights.safetensors"
    with torch.random.fork_rng(devices=[]):
        minilm.prepare(output, SENTENCES, epochs=10, learning_rate=3e-3)
    losses = [float(line.split()[3].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < 0.2 < losses[0]

    (tmp_path / "sst2_dev.tsv").write_text("".join(f"{text} indeed\t{label}\n" for text, label in SENTENCES[:40]))
    options = [f"folder={tmp_path}", f"data_dir={tmp_path}", "data.calibration.samples=60"]
    recipe = load_recipe(ROOT / "examples" / "minilm_sst2.yaml", options)
    # Nearly all parameters of this network are embeddings.
    half = parse_pass({"mi-nodes": {"target_units": 0.5}})
    prepared = prepare(recipe.model_copy(update={"passes": [half]}), create_manager())
    assert prepared.session.roles.calibration.trims, "BERT ignores padding"
    with torch.no_grad():
        rows = {name: torch.from_numpy(array) for name, array in prepared.evaluation.inputs.items()}
        right = (prepared.session.baseline(**rows).logits.argmax(1).numpy() == prepared.evaluation.labels).mean()
    assert right > 0.9
    outcome = run_passes(prepared.session, prepared.passes, prepared.manager)
    [record] = outcome.records
    assert record.certificate.holds
    for layer in outcome.model.bert.encoder.layer:
        assert (layer.intermediate.dense.out_features, layer.attention.self.query.out_features) == (24, 16)
