"""The data sources against plain numpy, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from secateurs.data import resolve_roles
from secateurs.errors import DataError
from secateurs_adapters.datasets import (
    DIGITS_NORMALISE,
    DigitsSettings,
    ImageFolderSettings,
    NpzSettings,
    TsvSettings,
    load_digits,
    load_image_folder,
    load_npz,
    load_tsv,
)

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


def saved(folder: Path, **arrays) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def pictures(n: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3)).astype(np.uint8)


class TestDigits:
    def test_split(self):
        from sklearn.datasets import load_digits as original

        train, evaluation = load_digits(DigitsSettings()), load_digits(DigitsSettings(split="evaluation"))
        assert (len(train), len(evaluation)) == (1347, 450)
        assert (train.origin, evaluation.origin) == ("digits:train", "digits:evaluation")
        assert not set(train.fingerprints()) & set(evaluation.fingerprints())
        counts = np.bincount(original().target)
        np.testing.assert_allclose(np.bincount(evaluation.labels), counts * 450 / 1797, atol=1)
        assert train.inputs["input"].shape == (1347, 1, 8, 8)
        assert train.inputs["input"].dtype == np.float32
        assert train.labels.dtype == np.int64

    def test_all_images_with_their_labels(self):
        from sklearn.datasets import load_digits as original

        digits = original()
        known = {image.astype(int).tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
        for split in ("train", "evaluation"):
            data = load_digits(DigitsSettings(split=split))
            mean, std = DIGITS_NORMALISE.mean[0], DIGITS_NORMALISE.std[0]
            pixels = np.rint((data.inputs["input"][:, 0].astype(np.float64) * std + mean) * 16).astype(int)
            assert [known.pop(image.tobytes()) for image in pixels] == data.labels.tolist()
        assert not known

    def test_statistics_are_those_of_the_training_images(self):
        images = load_digits(DigitsSettings()).inputs["input"]
        assert abs(images.mean()) < 1e-3
        assert abs(images.std() - 1) < 1e-3

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match=r"pip install 'secateurs\[data\]'"):
            load_digits(DigitsSettings())


class TestNpz:
    @settings(max_examples=25, deadline=None)
    @given(
        images=hnp.arrays(
            np.uint8, st.tuples(st.integers(1, 4), st.integers(4, 6), st.integers(4, 6), st.sampled_from([1, 3]))
        ),
        first=st.booleans(),
    )
    def test_images_against_a_loop(self, images, first, tmp_path_factory):
        path = saved(tmp_path_factory.mktemp("npz"), images=images.transpose(0, 3, 1, 2) if first else images)
        channels = images.shape[-1]
        normalise = {"mean": MEAN[:channels], "std": STD[:channels]}
        result = load_npz(NpzSettings(file=path, labels_key=None, normalise=normalise)).inputs["input"]
        expected = np.empty((len(images), channels, *images.shape[1:3]))
        for channel in range(channels):
            expected[:, channel] = (images[..., channel] / 255.0 - MEAN[channel]) / STD[channel]
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)

    def test_labels_and_origin(self, tmp_path, monkeypatch):
        saved(tmp_path, images=pictures(), labels=np.array([3, 1, 0, 2], np.uint8))
        monkeypatch.chdir(tmp_path)
        data = load_npz(NpzSettings(file="data.npz"))
        assert data.labels.dtype == np.int64
        assert data.labels.tolist() == [3, 1, 0, 2]
        assert data.origin == f"npz:{(tmp_path / 'data.npz').resolve()}:images"

    def test_two_arrays_of_one_file_are_two_origins(self, tmp_path):
        path = saved(tmp_path, train=pictures(), test=pictures(seed=1))
        origins = {
            load_npz(NpzSettings(file=path, images_key=key, labels_key=None)).origin for key in ("train", "test")
        }
        assert len(origins) == 2

    def test_an_array_that_is_not_there_is_answered_with_those_that_are(self, tmp_path):
        path = saved(tmp_path, x=pictures(), y=np.zeros(4, np.int64))
        with pytest.raises(DataError) as caught:
            load_npz(NpzSettings(file=path))
        assert "unknown array 'images'" in str(caught.value)
        assert "Known: 'x', 'y'." in str(caught.value)
        assert "In a recipe, `images_key`, `labels_key` and `inputs` name the arrays." in str(caught.value)

    def test_grey_images_without_a_channel_axis(self, tmp_path):
        path = saved(tmp_path, images=pictures()[..., 0], labels=np.zeros(4, np.int32))
        assert load_npz(NpzSettings(file=path)).inputs["input"].shape == (4, 1, 6, 5)

    def test_floats_are_not_scaled(self, tmp_path):
        images = np.random.default_rng(0).random((4, 3, 5, 5))
        path = saved(tmp_path, images=images, labels=np.zeros(4, np.int64))
        data = load_npz(NpzSettings(file=path))
        np.testing.assert_array_equal(data.inputs["input"], images.astype(np.float32))

    def test_named_inputs_stay_as_they_are(self, tmp_path):
        ids, weights = np.arange(8).reshape(4, 2), np.linspace(0, 1, 4, dtype=np.float16)
        path = saved(tmp_path, ids=ids, weights=weights, targets=np.array([0.5, 1.5, 2.5, 3.5]))
        data = load_npz(NpzSettings(file=path, inputs=["weights", "ids"], labels_key="targets"))
        assert list(data.inputs) == ["weights", "ids"]
        np.testing.assert_array_equal(data.inputs["ids"], ids)
        assert (data.inputs["weights"].dtype, data.inputs["ids"].dtype) == (np.float16, np.int64)
        assert data.labels.tolist() == [0.5, 1.5, 2.5, 3.5]

    @pytest.mark.parametrize(
        ("arrays", "options", "message"),
        [
            ({"image": pictures()}, {}, r"unknown array 'images'\. Did you mean 'image'\? Known: 'image'"),
            ({"images": pictures()}, {}, r"unknown array 'labels'.*Known: 'images'"),
            ({"images": pictures(), "labels": np.arange(3)}, {}, "4 examples but 3 labels"),
            ({"images": pictures(), "labels": np.array(3)}, {}, "'labels'.*a single value"),
            ({"images": pictures(), "labels": np.array([{}] * 4)}, {}, "'labels'.*holds object.*unpickled"),
            ({"images": pictures(), "labels": np.array(list("abcd"))}, {}, "'labels'.*only plain numbers"),
            ({"images": pictures()[:, :, 0, 0]}, {"labels_key": None}, r"shape \(4, 6\).*inputs: \[images\]"),
            ({"images": pictures().astype(np.int64)}, {"labels_key": None}, "holds int64; images are uint8"),
            ({"images": pictures()[:, :3]}, {"labels_key": None}, "both of axes 1 and 3.*set `layout`"),
            ({"images": pictures()[..., :2]}, {"labels_key": None}, "neither of axes 1 and 3"),
            ({"images": pictures()}, {"labels_key": None, "max_bytes": 359}, "360 bytes in memory, more than the 359"),
            (
                {"images": pictures()},
                {"labels_key": None, "normalise": {"mean": [0, 0], "std": [1, 1]}},
                "2 channels.* 3;",
            ),
            ({"images": pictures()[:0]}, {"labels_key": None}, "is empty"),
            ({"images": np.full((2, 3, 4, 4), np.nan)}, {"labels_key": None}, "NaN or infinite"),
        ],
    )
    def test_refusals(self, tmp_path, arrays, options, message):
        with pytest.raises(DataError, match=message):
            load_npz(NpzSettings(file=saved(tmp_path, **arrays), **options))

    def test_other_files(self, tmp_path):
        with pytest.raises(DataError, match=r"the file 'missing\.npz' does not exist.*in `file`"):
            load_npz(NpzSettings(file="missing.npz"))
        with pytest.raises(DataError, match="does not exist"):
            load_npz(NpzSettings(file=tmp_path))
        np.save(tmp_path / "one.npy", pictures())
        with pytest.raises(DataError, match=r"not an \.npz file.*numpy\.savez"):
            load_npz(NpzSettings(file=tmp_path / "one.npy"))

    def test_a_bomb_is_refused_before_it_is_decompressed(self, tmp_path):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**10, 2**10, 3)}
        )
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
            archive.writestr("images.npy", header.getvalue())
        with pytest.raises(DataError, match=f"{3 * 2**40} bytes"):
            load_npz(NpzSettings(file=tmp_path / "bomb.npz", labels_key=None))

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_damage_is_always_a_data_error(self, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("npz")
        content = bytearray(saved(folder, images=pictures(2), labels=np.arange(2)).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content
        (folder / "data.npz").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                count = len(load_npz(NpzSettings(file=folder / "data.npz")))
            except DataError:
                return
        assert count == 2

    def test_settings(self):
        with pytest.raises(ValidationError, match="extra_forbidden"):
            NpzSettings(file="a.npz", image_key="x")
        with pytest.raises(ValidationError, match="one of each per channel"):
            NpzSettings(file="a.npz", normalise={"mean": [0], "std": [1, 1]})
        with pytest.raises(ValidationError, match="greater than 0"):
            NpzSettings(file="a.npz", normalise={"mean": [0], "std": [0]})
        with pytest.raises(ValidationError, match="leave them out where `inputs` is given"):
            NpzSettings(file="a.npz", inputs=["x"], layout="NHWC")
        for model in (DigitsSettings, NpzSettings, ImageFolderSettings, TsvSettings):
            assert all(field.description for field in model.model_fields.values())


@pytest.fixture
def zoo(tmp_path):
    """Return a folder with two classes of images of one colour each."""
    from PIL import Image

    for name, colour in (("cat", (255, 0, 51)), ("ant", (0, 102, 255))):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        for number, suffix in enumerate(("png", "bmp")):
            Image.new("RGB", (7, 9), colour).save(tmp_path / "zoo" / name / f"{number}.{suffix}")
    (tmp_path / "zoo" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "zoo"


class TestImageFolder:
    def test_classes_are_sorted_folders(self, zoo):
        data = load_image_folder(ImageFolderSettings(folder=zoo, size=[4, 5]))
        assert data.labels.tolist() == [0, 0, 1, 1]
        assert data.inputs["input"].shape == (4, 3, 4, 5)
        np.testing.assert_allclose(data.inputs["input"][0, :, 2, 2], [0, 0.4, 1], atol=1e-6)
        np.testing.assert_allclose(data.inputs["input"][3, :, 0, 0], [1, 0, 0.2], atol=1e-6)
        assert data.origin == f"image_folder:{zoo.resolve()}"

    def test_given_classes_keep_their_labels(self, zoo):
        options = {"folder": zoo, "size": (2, 2), "classes": ["dog", "cat", "ant"], "channels": 1}
        data = load_image_folder(ImageFolderSettings(**options, normalise={"mean": [0.5], "std": [0.5]}))
        assert data.labels.tolist() == [1, 1, 2, 2]
        assert data.inputs["input"].shape == (4, 1, 2, 2)
        with pytest.raises(DataError, match=r"unknown class 'ant'.*Known: 'cat'"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2), classes=["cat"]))

    def test_a_role_that_lacks_a_class_is_refused(self, zoo, tmp_path):
        (tmp_path / "other" / "cat").mkdir(parents=True)
        (tmp_path / "other" / "cat" / "0.png").write_bytes((zoo / "ant" / "0.png").read_bytes())
        whole, part = ({"folder": folder, "size": (2, 2)} for folder in (zoo, tmp_path / "other"))
        pools = [load_image_folder(ImageFolderSettings(**options)) for options in (whole, part)]
        with pytest.raises(DataError, match="the label 0 is 'ant' in 'calibration' and 'cat' in 'evaluation'"):
            resolve_roles(dict(zip(("calibration", "evaluation"), pools, strict=True)), {}, 0)
        named = load_image_folder(ImageFolderSettings(**part, classes=["ant", "cat"]))
        assert named.labels.tolist() == [1]
        assert named.classes == pools[0].classes == ("ant", "cat")

    def test_links_out_of_the_folder(self, zoo, tmp_path):
        (tmp_path / "secret").mkdir()
        (zoo / "cat" / "0.png").rename(tmp_path / "secret" / "0.png")
        (zoo / "cat" / "0.png").symlink_to(tmp_path / "secret" / "0.png")
        with pytest.raises(DataError, match=r"0\.png' is a link out of the folder"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))
        (zoo / "cat" / "0.png").unlink()
        (zoo / "owl").symlink_to(tmp_path / "secret")
        with pytest.raises(DataError, match="owl' is a link out of the folder"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))

    def test_bad_images(self, zoo, monkeypatch):
        from PIL import Image

        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
            with pytest.raises(DataError, match="DecompressionBombWarning"):
                load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
            with pytest.raises(DataError, match="DecompressionBombError"):
                load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))
        Image.new("I;16", (3, 3)).save(zoo / "ant" / "deep.png")
        with pytest.raises(DataError, match=r"deep\.png'.*not 8 bits per channel"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))
        (zoo / "ant" / "a.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"a\.png' cannot be read"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))

    def test_missing_things(self, zoo, tmp_path, monkeypatch):
        with pytest.raises(DataError, match="the folder 'nowhere' does not exist"):
            load_image_folder(ImageFolderSettings(folder="nowhere", size=(2, 2)))
        with pytest.raises(DataError, match="more than the 191 of `max_bytes`"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2), max_bytes=191))
        (zoo / "empty").mkdir()
        with pytest.raises(DataError, match="empty' holds no images"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))
        with pytest.raises(DataError, match="has no sub-folders"):
            load_image_folder(ImageFolderSettings(folder=zoo / "empty", size=(2, 2)))
        (zoo / "empty").rmdir()
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(DataError, match=r"secateurs\[data\]"):
            load_image_folder(ImageFolderSettings(folder=zoo, size=(2, 2)))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Return the folder of a tokenizer that splits at spaces."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, pad in (("plain", "[PAD]"), ("unpadded", None)):
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", pad_token=pad)
        fast.save_pretrained(folder / name)
    return folder


@pytest.mark.hf
class TestTsv:
    def test_columns_by_position(self, tmp_path, words):
        (tmp_path / "t.tsv").write_text('good film\t1\nbad "film film film\t0\r\n\n', encoding="utf-8")
        data = load_tsv(TsvSettings(file=tmp_path / "t.tsv", tokenizer=str(words / "plain"), max_length=4))
        assert data.inputs["input_ids"].tolist() == [[2, 4, 0, 0], [3, 1, 4, 4]]
        assert data.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert data.labels.tolist() == [1, 0]
        assert {array.dtype.name for array in data.inputs.values()} == {"int64"}
        assert data.keyword
        assert data.origin == f"tsv:{(tmp_path / 't.tsv').resolve()}"

    def test_columns_by_name_and_classes(self, tmp_path, words):
        (tmp_path / "t.tsv").write_text("mood\ttext\npos\tgood\nneg\tbad\n", encoding="utf-8")
        options = {"file": tmp_path / "t.tsv", "tokenizer": str(words / "plain"), "text": "text", "max_length": 1}
        data = load_tsv(TsvSettings(**options, label="mood", classes=["neg", "pos"]))
        assert data.labels.tolist() == [1, 0]
        assert data.inputs["input_ids"].tolist() == [[2], [3]]
        assert data.classes == ("neg", "pos")
        assert load_tsv(TsvSettings(**options, label=None)).labels is None

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ("good\t1\nbad\n", {}, "row 2 has 1 columns"),
            ("text\tlabel\ngood\t1\n", {}, "row 1: the label 'label' is not an integer.*`header: true`"),
            ("text\tlabel\ngood\t1\n", {"text": "txt"}, "unknown column 'txt'. Did you mean 'text'"),
            ("good\tmaybe\n", {"classes": ["no", "yes"]}, "row 1: unknown label 'maybe'"),
            ("good\t1\n", {"text": -1}, "columns count from 0"),
            ("text\tlabel\n", {"header": True}, "no rows"),
        ],
    )
    def test_refusals(self, tmp_path, content, options, message):
        (tmp_path / "t.tsv").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_tsv(TsvSettings(file=tmp_path / "t.tsv", tokenizer="none", **options))

    def test_not_text(self, tmp_path):
        (tmp_path / "t.tsv").write_bytes(b"\xff\xfe\xfa\t1\n")
        with pytest.raises(DataError, match="UTF-8"):
            load_tsv(TsvSettings(file=tmp_path / "t.tsv", tokenizer="none"))

    def test_tokenizers(self, tmp_path, words, monkeypatch):
        (tmp_path / "t.tsv").write_text("good\t1\n", encoding="utf-8")
        with pytest.raises(DataError, match="no padding token"):
            load_tsv(TsvSettings(file=tmp_path / "t.tsv", tokenizer=str(words / "unpadded")))
        with pytest.raises(DataError, match=r"the tokenizer '.*nowhere' cannot be loaded"):
            load_tsv(TsvSettings(file=tmp_path / "t.tsv", tokenizer=str(tmp_path / "nowhere")))
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(DataError, match=r"secateurs\[hf\]"):
            load_tsv(TsvSettings(file=tmp_path / "t.tsv", tokenizer="any"))
