"""Networks by name or folder: the checkpoint's own weights or an error, never random ones and never code."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from secateurs.errors import ModelError, RecipeError
from secateurs_adapters.hf_models import load_hf

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 5, 3]])


def load(folder, weights=None, **arguments):
    return load_hf(str(folder), arguments=arguments, weights=weights, folder=folder)


@pytest.mark.parametrize("arguments", [{}, {"task": "text-classification"}, {"attention": "eager"}])
def test_the_weights_are_those_of_the_folder(bert, arguments):
    reference = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    model = load(bert, **arguments)
    assert not model.training
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, reference(input_ids=IDS).logits, atol=1e-6)
    assert model.config._attn_implementation == arguments.get("attention", "sdpa")


def test_every_task_builds_its_head(tmp_path):
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    wav = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embeddings": 4}
    wav |= {"num_feat_extract_layers": 1, "num_conv_pos_embedding_groups": 2}
    t5 = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    expected = {
        "text-classification": (transformers.BertConfig(**small), "BertForSequenceClassification"),
        "token-classification": (transformers.BertConfig(**small), "BertForTokenClassification"),
        "image-classification": (transformers.ViTConfig(**small), "ViTForImageClassification"),
        "audio-classification": (transformers.Wav2Vec2Config(**small, **wav), "Wav2Vec2ForSequenceClassification"),
        "causal-lm": (transformers.LlamaConfig(vocab_size=20, **small), "LlamaForCausalLM"),
        "seq2seq-lm": (transformers.T5Config(**t5), "T5ForConditionalGeneration"),
    }
    for task, (config, name) in expected.items():
        config.save_pretrained(tmp_path / task)
        model = load(tmp_path / task, task=task, pretrained=False)
        assert type(model).__name__ == name
        assert getattr(model.config, "use_cache", False) is False


def test_the_configuration_and_the_precision_can_be_changed(bert):
    model = load(bert, pretrained=False, config={"num_labels": 5}, dtype="bfloat16")
    assert model.classifier.out_features == 5
    assert model.classifier.weight.dtype == torch.bfloat16


def test_weights_from_another_file(bert, tmp_path):
    other = transformers.BertForSequenceClassification.from_pretrained(bert)
    torch.nn.init.zeros_(other.classifier.weight)
    other.save_pretrained(tmp_path / "other")
    model = load(bert, weights=tmp_path / "other" / "model.safetensors")
    assert model.classifier.weight.abs().max() == 0


def test_a_head_without_weights_is_refused(tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=15
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"lacks 2 weights.*classifier\.bias, classifier\.weight.*would be random"):
        load(tmp_path / "encoder", task="text-classification")


def test_a_pickle_is_refused(bert):
    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    torch.save(model.state_dict(), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Only safetensors are read"):
        load(bert)


def test_code_of_a_checkpoint_is_never_run(bert):
    marker = bert / "ran"
    (bert / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code of a checkpoint is never run"):
        load(bert)
    assert not marker.exists()


def test_mistakes(bert, tmp_path):
    with pytest.raises(ModelError, match="no configuration of a network at"):
        load(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"unknown option 'tusk'.*'task'"):
        load(bert, tusk="causal-lm")
    with pytest.raises(RecipeError, match="text-classification"):
        load(bert, task="poetry")
    with pytest.raises(ModelError, match="BertConfig has no 'layers'"):
        load(bert, config={"layers": 3})
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchNetwork"]}))
    with pytest.raises(ModelError, match=r"names NoSuchNetwork.*give `task`"):
        load(bert)
