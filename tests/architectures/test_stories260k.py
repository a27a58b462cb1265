"""A real, tiny Llama with grouped queries, pruned in depth, feed-forward and key-value heads: it still writes, with a cache and as a file."""

from __future__ import annotations

import json

import pytest
import torch
from stories import DATA, HEADS, HIDDEN, KV_HEADS, LAYERS, WEIGHTS, WIDTH, load, perplexity, sample, write

import secateurs
from secateurs.errors import ModelError
from secateurs.forward import to_dataset

transformers = pytest.importorskip("transformers")

VOCABULARY = DATA / "stories260k_vocab.json"

pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(not WEIGHTS.exists(), reason="shared/data/weights_stories260k_llama.safetensors is not there"),
]

HALF = HIDDEN // 2
HEAD_DIM = WIDTH // HEADS


@pytest.fixture(scope="module")
def dense():
    """Return the trained network."""
    return load()


@pytest.fixture(scope="module")
def stories(dense):
    """Return 80 texts of 64 tokens that the network wrote itself, by seeded sampling."""
    return sample(dense, 64, 80, seed=0)


@pytest.fixture(scope="module")
def result(dense, stories):
    """Return the network without one layer, half of its feed-forwards, and one of four key-value heads."""
    return secateurs.prune(
        dense,
        {"input_ids": stories[:2]},
        [{"input_ids": stories[:48]}],
        passes=[
            {"cka-cluster": {"threshold": 0.5, "max_blocks": 1, "tolerance": 1.0}},
            # Half of the 4 key-value heads would be 2; at least 3 units stay in every group.
            {"mi-nodes": {"target_units": 0.5, "min_units": 3, "uniform": True}},
        ],
        evaluate=lambda network: -perplexity(network, stories[48:64]) / 1e6,
    )


def test_the_dense_network_tells_a_story(dense):
    vocabulary = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    text = "".join(vocabulary[token] for token in write(dense, 40)[0, 1:])
    assert text.startswith(" Once upon a time, there was a little girl named Lily. She loved to play outside")


def test_every_pass_is_certified(result):
    assert [(record.name, record.edits) for record in result.report.passes] == [("cka-cluster", 1), ("mi-nodes", 8)]
    assert all(record.certificate.holds for record in result.report.passes)
    layers = [layer for layer in result.model.model.layers if not isinstance(layer, secateurs.surgery.Bypass)]
    assert len(layers) == LAYERS - 1
    for layer in layers:
        assert layer.mlp.down_proj.in_features == HALF
        assert layer.self_attn.k_proj.out_features == (KV_HEADS - 1) * HEAD_DIM
        assert layer.self_attn.q_proj.out_features == (HEADS - HEADS // KV_HEADS) * HEAD_DIM
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight, "the embedding is still tied"


def test_it_still_predicts_held_out_stories(dense, result, stories, record_property):
    held_out = stories[64:]
    before, after = perplexity(dense, held_out), perplexity(result.model, held_out)
    record_property("perplexity", f"{before:.2f} -> {after:.2f}")
    print(f"perplexity of held-out stories: {before:.2f} dense, {after:.2f} pruned")
    assert before < 4
    assert after < 40  # 512 would be guessing; the network was not trained after it lost half of its weights
    assert result.report.ratios.params < 0.55


def test_decoding_with_a_cache_equals_decoding_without(result):
    with_cache, without = (write(result.model, 40, cache=cache, min_new_tokens=40) for cache in (True, False))
    assert with_cache.shape == (1, 41)
    assert torch.equal(with_cache, without)


def test_the_file_agrees_for_any_batch(tmp_path, result, stories):
    pytest.importorskip("onnxruntime")
    from secateurs_adapters.export import DynamoExporter

    artifact = DynamoExporter()(
        result.model, to_dataset({"input_ids": stories[:8]}), tmp_path / "stories.onnx", opset=20
    )
    assert artifact.parity.batch_sizes == [1, 3]
    assert artifact.parity.max_rel <= artifact.parity.tolerance <= 1e-4


def test_it_reloads_without_secateurs_as_a_smaller_llama(tmp_path, result):
    from secateurs_adapters.huggingface import save_pretrained

    if int(transformers.__version__.partition(".")[0]) >= 5:
        # 6 heads on a width of 64: transformers 5 allows only heads that divide the width, whatever `head_dim` says.
        with pytest.raises(ModelError, match=r"not a multiple of the number of attention heads \(6\)"):
            save_pretrained(result.model, result.plan, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        return
    save_pretrained(result.model, result.plan, tmp_path / "saved")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (small.config.num_hidden_layers, small.config.num_key_value_heads, small.config.head_dim) == (4, 3, HEAD_DIM)
    assert torch.equal(write(small, 40), write(result.model, 40))
