"""Tiny networks with their processors, as the hub has them: config.json, model.safetensors, tokenizer or processor files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
from tiny_hf import SMALL, WORDS, scaled, sentences, tokenizer_into  # noqa: E402 - it needs transformers


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "huggingface":
            item.add_marker(pytest.mark.hf)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Let `datasets` keep its copies in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def bert(tmp_path):
    """Return the folder of a BERT for sentences of two classes."""
    folder = tmp_path / "bert"
    tokenizer_into(folder)
    config = transformers.BertConfig(vocab_size=15, max_position_embeddings=32, num_labels=2, **SMALL)
    scaled(transformers.BertForSequenceClassification(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def vit(tmp_path):
    """Return the folder of a ViT for images of 16x16 and three classes."""
    folder = tmp_path / "vit"
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SMALL)
    scaled(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path):
    """Return a folder with train.csv and test.csv, whose labels follow the first word."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = [f"{text},{int(text.split()[0] in WORDS[:5])}" for text in dict.fromkeys(sentences(60, seed))]
        (folder / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    return folder
