"""Recipes that name a Hugging Face network and data of `datasets`, and the folder that their runs leave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from tiny_hf import pictures, plain_tokenizer_into, scaled, sentences

import secateurs
from secateurs import checkpoint, cli
from secateurs.errors import ModelError
from secateurs.forward import to_dataset
from secateurs.manager import create_manager
from secateurs.plan import Plan
from secateurs.recipe import load_recipe, parse_recipe
from secateurs.runner import dry_run, prepare
from secateurs.surgery import applied
from secateurs_adapters.hf_folder import write_folder
from secateurs_adapters.hf_models import load_hf, load_pruned

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 5, 3]])
DEPTH = {"cka-cluster": {"threshold": 0.0, "max_blocks": 1, "tolerance": 1.0}}
TARGET = {"repeats": 4, "warmup": 1, "memory_repeats": 1}


def texts(reviews: Path) -> dict:
    role = {"source": "hf", "dataset": str(reviews), "text": "sentence", "max_length": 12}
    return {"calibration": {**role, "split": "train"}, "evaluation": {**role, "split": "test"}}


def run(folder: Path, recipe: dict, *more: str) -> tuple[int, dict]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "targets": [TARGET], **recipe}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path), "--output", str(folder / "out"), *more])
    return ended.value.code, json.loads((folder / "out" / "report.json").read_text())


def pruned(folder: Path, recipe: dict):
    """Return what the passes of a recipe make, with its folder as a run writes it but for what is measured."""
    ready = prepare(parse_recipe(recipe, folder=folder), create_manager())
    outcome = dry_run(ready).outcome
    (folder / "out").mkdir()
    checkpoint.save(outcome.model, outcome.plan, folder / "out")
    example = ready.session.roles.calibration.take([0, 1])
    return ready, outcome, write_folder(outcome.model, outcome.plan, folder / "out", example)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def onnx_logits(path, **inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def full(ids):
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": (ids > 0).long()}


def test_a_run_leaves_a_folder_that_from_pretrained_reloads(tmp_path, bert, reviews, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"hf": "bert", "task": "text-classification"}
    code, report = run(tmp_path, {"model": model, "data": texts(Path("reviews")), "passes": [DEPTH]})
    out = tmp_path / "out"
    assert code == 0, report["reasons"]
    assert any("`from_pretrained` of transformers reloads" in note for note in report["notes"])

    folder = out / "huggingface"
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert transformers.AutoTokenizer.from_pretrained(folder)("good film")["input_ids"] == [2, 5, 7, 3]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card, "a path of one machine is no name on the hub"
    assert "BertForSequenceClassification.from_pretrained" in card
    assert "load_pruned" in (out / "README.md").read_text()

    expected = logits(plain, input_ids=IDS)
    assert expected.abs().max() > 1e-3
    assert torch.equal(logits(load_pruned(out), input_ids=IDS), expected)
    assert torch.equal(logits(load_hf(str(out), arguments={}, weights=None, folder=out), input_ids=IDS), expected)
    build = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    assert torch.equal(logits(secateurs.load(out, build=build), input_ids=IDS), expected)
    np.testing.assert_allclose(
        onnx_logits(out / "model.onnx", **full(torch.nn.functional.pad(IDS, (0, 7)))), expected.numpy(), atol=1e-5
    )

    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["model"] == {"hf": str(bert), "arguments": {"task": "text-classification"}}
    assert written["data"]["calibration"]["dataset"] == str(reviews)
    before = load_recipe(out / "recipe.yaml").digest()
    transformers.AutoModelForSequenceClassification.from_config(build.config).save_pretrained(bert)
    assert load_recipe(out / "recipe.yaml").digest() != before, "other weights are another run"


def uneven(folder, *, depth, narrowed_layers=1, dtype=torch.float32):
    """Return a network of which only so many layers are narrower, without its third if asked for, saved as a run saves it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", dtype=dtype)
    passes = [*([DEPTH] if depth else []), {"magnitude": {"target_units": 0.5, "heads": False, "refit": "none"}}]
    whole = secateurs.prune(model, full(IDS), [full(IDS.repeat(8, 1))], passes, evaluate=lambda _: 1.0).plan
    narrowed = [edit for edit in whole.edits if edit.edit == "remove_units"]
    plan = Plan(edits=tuple(edit for edit in whole.edits if edit not in narrowed[narrowed_layers:]))
    pruned = applied(model, plan)
    (folder / "out").mkdir()
    checkpoint.save(pruned, plan, folder / "out")
    return pruned.eval(), plan


@pytest.mark.parametrize("depth", [False, True])
def test_what_no_configuration_describes_fails_in_from_pretrained(tmp_path, bert, depth):
    model, plan = uneven(tmp_path, depth=depth)
    said = write_folder(model, plan, tmp_path / "out", to_dataset(full(IDS)))
    out = tmp_path / "out"
    assert "`from_pretrained` cannot hold the network (no BertConfig describes the pruned" in said
    for folder in (out, out / "huggingface"):
        for auto in (transformers.AutoModelForSequenceClassification, transformers.BertForSequenceClassification):
            for options in ({}, {"ignore_mismatched_sizes": True}):
                with pytest.raises((OSError, ValueError)):
                    auto.from_pretrained(str(folder), **options)
    again = load_pruned(out)
    assert torch.equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    with pytest.raises(ModelError, match="put all passes into one recipe"):
        load_hf(str(out), arguments={}, weights=None, folder=out)


@pytest.mark.parametrize("described", [True, False])
def test_a_network_comes_back_in_the_precision_it_was_saved_in(tmp_path, bert, described):
    model, plan = uneven(tmp_path, depth=True, narrowed_layers=0 if described else 1, dtype=torch.bfloat16)
    out = tmp_path / "out"
    write_folder(model, plan, out, to_dataset(full(IDS)))
    assert (out / "huggingface" / "model.safetensors").is_file() == described
    again = load_pruned(out)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert again.config.dtype == torch.bfloat16
    assert torch.equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    if not described:
        model.classifier.float()
        checkpoint.save(model, plan, out)
        found, expected = (
            {name: value.dtype for name, value in each.named_parameters()} for each in (load_pruned(out), model)
        )
        assert found == expected


def test_a_plan_that_starts_from_a_pruned_network_is_refused(tmp_path, bert):
    """The configuration with this plan alone would give another network."""
    model, _ = uneven(tmp_path, depth=False)
    with pytest.raises(ModelError, match="start from the original network"):
        write_folder(model, Plan(), tmp_path)
    assert not (tmp_path / "huggingface").exists()


def test_images(tmp_path, vit):
    for index, image in enumerate(pictures(48)):
        (tmp_path / "images" / "abc"[index % 3]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / "abc"[index % 3] / f"{index}.png")
    data = {"calibration": {"source": "hf", "dataset": str(tmp_path / "images"), "image": "image"}}
    ready, outcome, _ = pruned(tmp_path, {"model": {"hf": str(vit)}, "data": data, "passes": [DEPTH]})
    assert sorted(set(ready.session.roles.calibration.labels)) == [0, 1, 2]
    folder = tmp_path / "out" / "huggingface"
    plain = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert plain.config.num_hidden_layers == 3
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(pictures(2, 1), return_tensors="pt")
    assert torch.equal(logits(plain, **pixels), logits(outcome.model, **pixels))


def test_a_language_model_is_judged_by_its_own_loss(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=15, max_position_embeddings=32, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    plain_tokenizer_into(tmp_path / "llama")
    scaled(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "llama")
    rows = [json.dumps({"text": text}) for text in dict.fromkeys(sentences(60))]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    role = {"source": "hf", "dataset": str(tmp_path / "train.jsonl"), "text": "text", "next_token": True}
    recipe = {
        "model": {"hf": str(tmp_path / "llama"), "task": "causal-lm"},
        "data": {"calibration": {**role, "max_length": 10}},
        "metric": "perplexity",
        "passes": [{"magnitude": {"target_units": 0.5, "uniform": True, "refit": "none"}}],
    }
    ready, outcome, said = pruned(tmp_path, recipe)
    assert "of transformers reloads" in said
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "huggingface").eval()
    assert plain.config.intermediate_size == 32
    total, count = 0.0, 0
    validation = ready.session.roles.validation
    for ids, mask in zip(validation.inputs["input_ids"], validation.inputs["attention_mask"], strict=True):
        tokens = torch.as_tensor(ids[mask == 1])[None]
        with torch.no_grad():
            total += float(plain(input_ids=tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    found = -ready.session.evaluate(outcome.model)
    assert found == pytest.approx(float(np.exp(total / count)), rel=1e-4)


def test_a_folder_of_an_earlier_run_is_replaced_and_others_are_spared(tmp_path, bert):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    write_folder(model, Plan(), tmp_path)
    (tmp_path / "huggingface" / "stale.txt").write_text("old")
    write_folder(model, Plan(), tmp_path)
    assert not (tmp_path / "huggingface" / "stale.txt").exists()
    (tmp_path / "huggingface" / "secateurs.json").unlink()
    (tmp_path / "huggingface" / "mine.txt").write_text("keep")
    assert "was left alone" in write_folder(model, Plan(), tmp_path)
    assert (tmp_path / "huggingface" / "mine.txt").read_text() == "keep"
    assert write_folder(torch.nn.Linear(2, 2), Plan(), tmp_path) is None
