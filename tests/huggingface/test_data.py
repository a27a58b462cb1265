"""Data of the `datasets` library: what the network gets is what its own processor makes of each example."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from tiny_hf import pictures, sentences, tokenizer_into

from secateurs.errors import DataError
from secateurs_adapters.hf_data import load_hf
from secateurs_adapters.hf_settings import HfDataSettings


def load(**options):
    return load_hf(HfDataSettings(**{key: str(v) if hasattr(v, "suffix") else v for key, v in options.items()}))


@pytest.fixture
def words(tmp_path):
    tokenizer_into(tmp_path / "words")
    return tmp_path / "words"


def written(table, path, kind):
    if kind == "saved":
        table.save_to_disk(path)
    elif kind == "dictionary":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    else:
        path = path.with_suffix(f".{kind}")
        {"json": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](str(path))
    return path


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "saved", "dictionary"])
def test_texts_of_local_files(tmp_path, words, kind):
    texts = sentences(7)
    table = datasets.Dataset.from_dict({"review": texts, "stars": [0, 1, 2, 0, 1, 2, 0]})
    path = written(table, tmp_path / "data", kind)
    data = load(dataset=path, text="review", label="stars", processor=words, max_length=12)
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    for row, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        assert data.inputs["input_ids"][row].tolist() == ids + [0] * (12 - len(ids))
        assert data.inputs["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (12 - len(ids))
    assert data.inputs["input_ids"].dtype == np.int64
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert data.keyword
    assert data.tokens is not None


def test_splits_of_a_folder_are_separate_sources(reviews, words):
    how = {"dataset": reviews, "text": "sentence", "processor": words, "max_length": 12}
    train, test, part = (load(split=split, **how) for split in ("train", "test", "train[:5]"))
    assert len({train.origin, test.origin, part.origin}) == 3
    assert len(part) == 5
    assert (part.inputs["input_ids"] == train.inputs["input_ids"][:5]).all()


def test_pairs_of_texts(tmp_path, words):
    table = datasets.Dataset.from_dict({"a": ["good film"], "b": ["bad plot"], "label": [1]})
    data = load(dataset=written(table, tmp_path / "d", "json"), text="a", pair="b", processor=words, max_length=8)
    assert data.inputs["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_labels_as_words(tmp_path, words):
    table = datasets.Dataset.from_dict({"text": ["a", "the", "a"], "label": ["pos", "neg", "pos"]})
    path = written(table, tmp_path / "d", "json")
    how = {"dataset": path, "text": "text", "processor": words, "max_length": 4}
    assert load(classes=("neg", "pos"), **how).labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="label 'pos'"):
        load(**how)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    saved = written(table.cast(features), tmp_path / "e", "saved")
    assert load(**{**how, "dataset": saved}).labels.tolist() == [1, 0, 1]


def test_every_word_has_its_label_at_its_first_token(tmp_path, words):
    table = datasets.Dataset.from_dict(
        {"words": [["good", "film"], ["bad", "zzz", "plot"]], "tags": [[1, 2], [3, 0, 2]]}
    )
    data = load(
        dataset=written(table, tmp_path / "d", "json"), tokens="words", label="tags", processor=words, max_length=6
    )
    assert data.labels.tolist() == [[-100, 1, 2, -100, -100, -100], [-100, 3, 0, 2, -100, -100]]


def test_labels_of_a_language_model_give_its_own_loss(tmp_path, words):
    """The mean cross-entropy over our labels is the loss that transformers itself computes."""
    table = datasets.Dataset.from_dict({"text": sentences(6)})
    data = load(
        dataset=written(table, tmp_path / "d", "json"), text="text", next_token=True, processor=words, max_length=9
    )
    config = transformers.GPT2Config(
        vocab_size=15, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids, mask = (torch.as_tensor(data.inputs[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, labels=torch.where(mask == 1, ids, -100))
        ours = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), torch.as_tensor(data.labels).flatten())
    assert float(ours) == pytest.approx(float(own.loss), rel=1e-5)


def test_labels_of_a_sequence_to_sequence_model_give_its_own_loss(tmp_path):
    folder = tmp_path / "t5"
    tokenizer_into(folder)
    config = transformers.T5Config(
        vocab_size=15, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    table = datasets.Dataset.from_dict({"text": sentences(5), "summary": sentences(5, seed=1)})
    data = load(
        dataset=written(table, tmp_path / "d", "json"), text="text", target="summary", processor=folder, max_length=10
    )
    inputs = {name: torch.as_tensor(data.inputs[name]) for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    labels = torch.as_tensor(data.labels)
    with torch.no_grad():
        own = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
        ours = model(**inputs).logits
    assert torch.equal(ours, own.logits)
    loss = torch.nn.functional.cross_entropy(ours.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(float(own.loss), rel=1e-5)


def test_images_are_prepared_by_the_networks_own_processor(tmp_path, vit):
    images = pictures(5)
    folder = tmp_path / "images"
    for index, image in enumerate(images):
        (folder / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "train" / "ab"[index % 2] / f"{index}.png")
    data = load(dataset=folder, image="image", processor=vit)
    assert data.inputs["pixel_values"].shape == (5, 3, 16, 16)
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    for row, index in enumerate((0, 2, 4, 1, 3)):
        expected = processor(images[index], return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(data.inputs["pixel_values"][row], expected, atol=1e-6)


def test_recordings_are_prepared_by_the_networks_own_extractor(tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    extractor.save_pretrained(tmp_path / "wav")
    generator = np.random.default_rng(0)
    samples = [generator.standard_normal(length).astype(np.float32) for length in (60, 80, 100)]
    table = datasets.Dataset.from_dict({"sound": [list(map(float, item)) for item in samples], "label": [0, 1, 0]})
    path = written(table, tmp_path / "d", "parquet")
    how = {"dataset": path, "audio": "sound", "processor": tmp_path / "wav"}
    data = load(seconds=0.01, **how)
    assert data.inputs["input_values"].shape == (3, 80)
    assert data.inputs["attention_mask"].sum(1).tolist() == [60, 80, 80]
    kept = samples[2][:80]
    expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-7)
    np.testing.assert_allclose(data.inputs["input_values"][2], expected, atol=1e-5)
    with pytest.raises(DataError, match="3 lengths; set `seconds`"):
        load(**how)


def test_refusals(tmp_path, reviews, words):
    how = {"dataset": reviews, "text": "sentence", "processor": words}
    for change, message in (
        ({"text": "sentense"}, r"option `text`: unknown column 'sentense'.*'sentence'"),
        ({"label": "stars"}, r"option `label`: unknown column 'stars'.*`label: null`"),
        ({"split": "dev"}, "split 'dev', cannot be read"),
        ({"dataset": tmp_path / "none"}, "cannot be read"),
        ({"processor": tmp_path}, "the tokenizer .* cannot be loaded"),
        ({"processor": None}, "needs `processor`"),
        ({"max_bytes": 1000}, "more than the 1000 of `max_bytes`"),
        ({"split": "train[:0]"}, "corresponds to no data"),
    ):
        with pytest.raises(DataError, match=message):
            load(**{**how, **change})
    (tmp_path / "table.xlsx").write_text("")
    with pytest.raises(DataError, match=r"unknown kind of file '\.xlsx'"):
        load(**{**how, "dataset": tmp_path / "table.xlsx"})


def test_a_split_without_labels_is_refused(tmp_path, words):
    (tmp_path / "t.json").write_text("".join(json.dumps({"text": "a", "label": -1}) + "\n" for _ in range(3)))
    with pytest.raises(DataError, match=r"row 0: the label is -1.*`label: null`"):
        load(dataset=tmp_path / "t.json", text="text", processor=words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name one column of inputs"),
        ({"text": "a", "image": "b"}, "got text, image"),
        ({"image": "a", "pair": "b"}, "`pair` goes with `text`"),
        ({"text": "a", "next_token": True, "target": "b"}, "give only one of"),
        ({"text": "a", "next_token": True, "label": "b"}, "leave out `label`"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ValidationError, match=message):
        HfDataSettings(dataset="d", **options)
