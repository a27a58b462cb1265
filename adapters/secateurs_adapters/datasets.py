"""Data sources: scikit-learn's digits, arrays in an .npz, folders of images, and tables of text.

Each source is a function `load_<source>(settings) -> Dataset`; its options are in `secateurs_adapters.data_settings`.
What a source needs beyond numpy is imported when it is read. Pictures become float32 of shape
`(n, channels, height, width)`, scaled to [0, 1] and then normalised, under the input name `input`; integer labels
become int64. How many examples a role keeps is the role's business, not the source's.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from secateurs.data import Dataset
from secateurs.errors import DataError, unknown_name
from secateurs.files import read_file
from secateurs_adapters.data_settings import (
    DIGITS_NORMALISE,
    DigitsSettings,
    ImageFolderSettings,
    Normalise,
    NpzSettings,
    TsvSettings,
)
from secateurs_adapters.npz import read_arrays, refuse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "DIGITS_NORMALISE",
    "DigitsSettings",
    "ImageFolderSettings",
    "Normalise",
    "NpzSettings",
    "TsvSettings",
    "load_digits",
    "load_image_folder",
    "load_npz",
    "load_tsv",
    "normalised",
]

Array = npt.NDArray[Any]

DIGITS_EVALUATION = 450
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a file may be, whatever its name says: pillow hands other formats, such as EPS, to other programs."""
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_digits(settings: DigitsSettings) -> Dataset:
    """Return one side of the digits: stratified, always the same 1,347 for training and 450 for evaluation.

    Raises:
        DataError: scikit-learn is not installed.
    """
    digits = _require("sklearn.datasets", "digits", "data").load_digits()
    sides = _require("sklearn.model_selection", "digits", "data").train_test_split(
        np.arange(len(digits.target)), test_size=DIGITS_EVALUATION, stratify=digits.target, random_state=0
    )
    index = np.sort(sides[("train", "evaluation").index(settings.split)])
    images = normalised((digits.images[index, None] / 16).astype(np.float32), DIGITS_NORMALISE)
    return Dataset({"input": images}, digits.target[index].astype(np.int64), f"digits:{settings.split}")


def load_npz(settings: NpzSettings) -> Dataset:
    """Return the arrays of an .npz file; nothing in it is unpickled.

    Raises:
        DataError: the file is missing, not an .npz or too large, or an array is missing or has the wrong form.
    """
    names = settings.inputs or (settings.images_key,)
    labels = () if settings.labels_key is None else (settings.labels_key,)
    path = _existing(settings.file, "file")
    arrays = read_arrays(path, [*names, *labels], settings.max_bytes)
    label = arrays[labels[0]] if labels else None
    if label is not None and label.dtype.kind != "f":
        label = label.astype(np.int64)
    origin = f"npz:{path}:{','.join(names)}"
    if settings.inputs:
        return Dataset({name: arrays[name] for name in names}, label, origin)
    images = _channels_first(arrays[settings.images_key], settings, path)
    images = images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)
    return Dataset({"input": normalised(images, settings.normalise)}, label, origin)


def load_image_folder(settings: ImageFolderSettings) -> Dataset:
    """Return the images of a folder with the index of their sub-folder as the label.

    Files are read in the order of their names; hidden ones and those without an image's suffix do not count. Without
    `classes`, a folder that lacks a class numbers the rest otherwise, so the data set tells its classes, by which roles
    are compared.

    Raises:
        DataError: pillow is not installed, the folder is missing, a class has no images, an image cannot be read or is
            implausibly large, or a link leads out of the folder.
    """
    root = _existing(settings.folder, "folder")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"the folder {str(root)!r} has no sub-folders; put the images of each class into one.")
    for name in found:
        if settings.classes and name not in settings.classes:
            raise DataError(f"the folder {str(root)!r}: {unknown_name('class', name, settings.classes)}")
    classes = settings.classes or found
    files = [
        (label, path) for label, name in enumerate(classes) if name in found for path in _images(root / name, root)
    ]
    height, width = settings.size
    refuse_size(len(files) * settings.channels * height * width * 4, settings.max_bytes, root)
    images = np.empty((len(files), settings.channels, height, width), np.float32)
    for row, (_, path) in enumerate(files):
        images[row] = _decode(path, settings)
    labels = np.array([label for label, _ in files], np.int64)
    inputs = {"input": normalised(images, settings.normalise)}
    return Dataset(inputs, labels, f"image_folder:{root}", classes=tuple(classes))


def load_tsv(settings: TsvSettings) -> Dataset:
    """Return tokenised texts as `input_ids` and `attention_mask`, both int64 of shape `(n, max_length)`.

    Raises:
        DataError: transformers is not installed, the tokenizer is not here or cannot pad, the file is missing, or a
            line lacks a column or has an unknown label.
    """
    path = _existing(settings.file, "file")
    texts, words = _read_table(path, settings)
    tokenizer = _tokenizer(settings.tokenizer)
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=settings.max_length)
    inputs = {name: np.array(rows[name], np.int64) for name in ("input_ids", "attention_mask")}
    labels = None if settings.label is None else np.array(words, np.int64)
    classes = settings.classes if labels is not None and settings.classes else None
    return Dataset(inputs, labels, f"tsv:{path}", keyword=True, classes=classes)


def normalised(images: Array, normalise: Normalise | None) -> Array:
    """Return (images - mean) / std, channel by channel, as float32; None leaves the images as they are.

    Args:
        images: shape `(n, channels, height, width)`.
        normalise: one mean and one std per channel, or one for all.

    Raises:
        DataError: there are neither one nor `channels` of them.

    >>> float(normalised(np.ones((1, 1, 1, 1)), Normalise(mean=(0.5,), std=(0.25,)))[0, 0, 0, 0])
    2.0
    """
    if normalise is None:
        return images
    if len(normalise.mean) not in (1, images.shape[1]):
        raise DataError(
            f"`normalise` has {len(normalise.mean)} channels, the images have {images.shape[1]}; give one mean and one "
            f"std per channel, or one for all."
        )
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalise.mean, normalise.std))
    return ((images - mean) / std).astype(np.float32, copy=False)


def _require(module: str, source: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"the source {source!r} needs {module.partition('.')[0]!r}, which cannot be imported ({error}); install it "
            f"with `pip install 'secateurs[{extra}]'`."
        ) from error


def _existing(path: Path, kind: Literal["file", "folder"]) -> Path:
    if not (path.is_file() if kind == "file" else path.is_dir()):
        raise DataError(
            f"the {kind} {str(path)!r} does not exist (working directory {str(Path.cwd())!r}); give the path of a {kind} "
            f"in `{kind}`, absolute or relative to the working directory."
        )
    return path.resolve()


def _channels_first(images: Array, settings: NpzSettings, path: Path) -> Array:
    where = f"array {settings.images_key!r} of {str(path)!r}"
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(
            f"{where} holds {images.dtype}; images are uint8 (0 to 255) or floats. Read other arrays as they are with "
            f"`inputs: [{settings.images_key}]`."
        )
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise DataError(
            f"{where} has shape {images.shape}; images have 4 axes (or 3 if grey), the first for the examples. Read "
            f"other arrays as they are with `inputs: [{settings.images_key}]`."
        )
    first, last = (images.shape[axis] in (1, 3) for axis in (1, 3))
    if settings.layout is None and first == last:
        raise DataError(
            f"{where} has shape {images.shape}, where {'both' if last else 'neither'} of axes 1 and 3 can be the "
            f"channels (1 or 3); set `layout` to NHWC or NCHW."
        )
    return images.transpose(0, 3, 1, 2) if settings.layout == "NHWC" or (settings.layout is None and last) else images


def _images(folder: Path, root: Path) -> list[Path]:
    """Return the image files of one class; a link that leads out of `root` is refused."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not found:
        raise DataError(f"the class folder {str(folder)!r} holds no images ({' '.join(IMAGE_SUFFIXES)}); add some.")
    for path in (folder, *found):
        if not path.resolve().is_relative_to(root):
            raise DataError(
                f"{str(path)!r} is a link out of the folder {str(root)!r}, which is not followed; copy what it points to."
            )
    return found


def _decode(path: Path, settings: ImageFolderSettings) -> Array:
    """Return one image of shape `(channels, height, width)` in [0, 1]."""
    pillow = _require("PIL.Image", "image_folder", "data")
    height, width = settings.size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=IMAGE_FORMATS) as image:
                if image.mode in ("I", "F") or ";" in image.mode:
                    raise ValueError(f"its mode is {image.mode}, not 8 bits per channel")
                plain = image.convert("L" if settings.channels == 1 else "RGB")
                pixels = np.asarray(plain.resize((width, height), pillow.Resampling.BILINEAR), np.float32)
    except Exception as error:  # pillow raises nearly anything on a damaged file
        raise DataError(
            f"the image {str(path)!r} cannot be read ({type(error).__name__}: {error}); mend or remove it."
        ) from error
    return pixels.reshape(height, width, settings.channels).transpose(2, 0, 1) / np.float32(255)


def _read_table(path: Path, settings: TsvSettings) -> tuple[list[str], list[int]]:
    """Return the texts and, where labels are asked for, the labels."""
    content = read_file(path, "table", DataError, limit=settings.max_bytes)
    try:
        lines = [line.split("\t") for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} cannot be read as UTF-8 text ({error}); save it as UTF-8.") from error
    wanted = [column for column in (settings.text, settings.label) if column is not None]
    named = any(isinstance(column, str) for column in wanted) if settings.header is None else settings.header
    head = lines.pop(0) if named and lines else []
    columns = [_column(column, head, path) for column in wanted]
    texts: list[str] = []
    labels: list[int] = []
    for number, cells in enumerate(lines, start=2 if named else 1):
        if len(cells) <= max(columns):
            raise DataError(
                f"{str(path)!r}: row {number} has {len(cells)} columns, but column {max(columns)} (from 0) is asked for. "
                f"Separate columns by tabs, or set `text` and `label`."
            )
        texts.append(cells[columns[0]])
        if len(columns) > 1:
            labels.append(_class(cells[columns[1]].strip(), settings.classes, f"{str(path)!r}: row {number}"))
    if not texts:
        raise DataError(f"{str(path)!r} has no rows; at least one example is needed.")
    return texts, labels


def _column(column: int | str, head: Sequence[str], path: Path) -> int:
    names = [name.strip() for name in head]
    if isinstance(column, str) and column not in names:
        raise DataError(f"{str(path)!r}: {unknown_name('column', column, names)}")
    position = names.index(column) if isinstance(column, str) else column
    if position < 0:
        raise DataError(f"{str(path)!r}: column {position} is negative; columns count from 0.")
    return position


def _class(word: str, classes: Sequence[str], where: str) -> int:
    if classes:
        if word not in classes:
            raise DataError(f"{where}: {unknown_name('label', word, classes)}")
        return classes.index(word)
    try:
        return int(np.int64(int(word)))
    except (ValueError, OverflowError):
        raise DataError(
            f"{where}: the label {word!r} is not an integer; list the words in order in `classes`, or set "
            f"`header: true` if this line names the columns."
        ) from None


def _tokenizer(name: str) -> Any:
    transformers = _require("transformers", "tsv", "hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise DataError(
            f"the tokenizer {name!r} cannot be loaded ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). "
            f"Give a folder, relative to the working directory, or a name that is cached on this machine."
        ) from error
    if tokenizer.pad_token is None:
        raise DataError(f"the tokenizer {name!r} has no padding token; set `pad_token` in its tokenizer_config.json.")
    return tokenizer
