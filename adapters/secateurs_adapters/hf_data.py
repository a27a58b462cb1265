"""Data of the `datasets` library: texts, images and recordings, prepared as a Hugging Face network takes them.

The tokenizer, image processor or feature extractor is the network's own. Local files are read where they lie; nothing of
a data set is run as code.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateurs.data import IGNORED, Dataset
from secateurs.errors import DataError, unknown_name
from secateurs_adapters.hf_models import quiet
from secateurs_adapters.hf_settings import HfDataSettings

__all__ = ["load_hf"]

Array = npt.NDArray[Any]
CHUNK = 256
"""Examples that are prepared at a time."""
_BUILDERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}


def load_hf(settings: HfDataSettings) -> Dataset:
    """Return the examples of one split, by the names of the network's inputs; implements `secateurs.interfaces.DatasetLoader`.

    Texts become int64 ids and masks of shape `(n, max_length)`, padded on the right; images float32 of shape
    `(n, channels, height, width)`; recordings what the feature extractor makes of them.

    Raises:
        DataError: `datasets` or transformers is not installed, there is no such data, split or column, the processor
            cannot be loaded, or labels are missing or unknown.
    """
    table = _table(settings)
    for name in ("text", "pair", "tokens", "image", "audio", "target", "label"):
        column = getattr(settings, name)
        if column is not None and (name != "label" or not (settings.next_token or settings.target)):
            _check_column(table, column, name, settings)
    if settings.processor is None:
        raise DataError(
            f"the data set {settings.dataset!r} needs `processor`: the folder or name of the tokenizer, image processor or "
            f"feature extractor. Only beside `model: {{hf: ...}}` it may be left out."
        )
    if settings.image is not None:
        inputs, labels = _images(table, settings), _labels(table, settings)
    elif settings.audio is not None:
        inputs, labels = _recordings(table, settings), _labels(table, settings)
    else:
        inputs, labels = _texts(table, settings)
    origin = f"hf:{settings.dataset}:{settings.subset or ''}:{settings.split}"
    return Dataset(inputs, labels, origin, keyword=True)


# --- the table --------------------------------------------------------------------------------------------------------


def _table(settings: HfDataSettings) -> Any:
    datasets = _require("datasets")
    path = Path(settings.dataset)
    try:
        with quiet(), _no_bars(datasets):
            if path.is_file():
                found = _file(datasets, path, settings)
            elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                found = _saved(datasets, path, settings)
            else:
                found = datasets.load_dataset(
                    settings.dataset, settings.subset, split=settings.split, revision=settings.revision
                )
    except DataError:
        raise
    except Exception as error:  # datasets raises nearly anything here
        raise DataError(
            f"the data set {settings.dataset!r}, split {settings.split!r}, cannot be read ({_said(error)}). Give a name on "
            f"the hub (cached, or with access to it), a folder of data files, or one file ({', '.join(_BUILDERS)})."
        ) from error
    return found


def _file(datasets: Any, path: Path, settings: HfDataSettings) -> Any:
    if path.suffix.lower() not in _BUILDERS:
        raise DataError(f"{str(path)!r}: {unknown_name('kind of file', path.suffix.lower(), _BUILDERS)}")
    builder, options = _BUILDERS[path.suffix.lower()]
    split = re.match(r"\w+", settings.split)
    files = {split[0] if split else "train": str(path.resolve())}
    return datasets.load_dataset(builder, data_files=files, split=settings.split, **options)


def _saved(datasets: Any, path: Path, settings: HfDataSettings) -> Any:
    """Return what `save_to_disk` wrote: one split, or the one asked for."""
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.DatasetDict):
        return found
    if settings.split not in found:
        raise DataError(f"{str(path)!r}: {unknown_name('split', settings.split, found)}")
    return found[settings.split]


def _check_column(table: Any, column: str, option: str, settings: HfDataSettings) -> None:
    if column not in table.column_names:
        raise DataError(
            f"{settings.dataset!r}, option `{option}`: {unknown_name('column', column, table.column_names)}"
            + (" Set `label: null` for data without labels." if option == "label" else "")
        )


# --- texts ------------------------------------------------------------------------------------------------------------


def _texts(table: Any, settings: HfDataSettings) -> tuple[dict[str, Array], Array | None]:
    tokenizer = _tokenizer(settings)
    how = {"padding": "max_length", "truncation": True, "max_length": settings.max_length}
    # Ids, mask and kinds of tokens.
    _refuse(len(table), 3 * 8 * settings.max_length, settings)
    if settings.tokens is not None:
        rows = tokenizer(list(table[settings.tokens]), is_split_into_words=True, **how)
        return _named(rows), _word_labels(table, rows, settings)
    pairs = [] if settings.pair is None else [list(table[settings.pair])]
    inputs = _named(tokenizer(list(table[settings.text]), *pairs, **how))
    if settings.next_token:
        return inputs, _next_tokens(inputs)
    if settings.target is not None:
        written = _named(tokenizer(text_target=list(table[settings.target]), **how))
        labels = np.where(written["attention_mask"] == 1, written["input_ids"], IGNORED)
        inputs["decoder_input_ids"] = _shifted(labels, tokenizer.pad_token_id, settings)
        return inputs, labels
    return inputs, _labels(table, settings)


def _named(rows: Any) -> dict[str, Array]:
    return {name: np.asarray(rows[name], np.int64) for name in rows}


def _next_tokens(inputs: dict[str, Array]) -> Array:
    """Return at every position the id of the next token; the last one and padding have none."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = np.full_like(ids, IGNORED)
    labels[:, :-1] = np.where(mask[:, 1:] == 1, ids[:, 1:], IGNORED)
    return labels


def _shifted(labels: Array, padding: int, settings: HfDataSettings) -> Array:
    """Return what the decoder reads: the start token, then the target without its last token."""
    transformers = _require("transformers")
    try:
        with quiet():
            start = transformers.AutoConfig.from_pretrained(
                settings.processor, trust_remote_code=False
            ).decoder_start_token_id
    except Exception as error:
        raise DataError(
            f"`target` needs the network's configuration, and there is none at {settings.processor!r} ({_said(error)}); give "
            f"the network's folder or name as `processor`."
        ) from error
    if start is None:
        raise DataError(f"the configuration at {settings.processor!r} has no `decoder_start_token_id`; set it there.")
    first = np.full((len(labels), 1), start, np.int64)
    return np.concatenate([first, np.where(labels[:, :-1] == IGNORED, padding, labels[:, :-1])], 1)


def _word_labels(table: Any, rows: Any, settings: HfDataSettings) -> Array | None:
    """Return the label of each word at its first token; what continues a word, and padding, counts for nothing."""
    if settings.label is None:
        return None
    labels = np.full(np.asarray(rows["input_ids"]).shape, IGNORED, np.int64)
    names = _class_names(table, settings)
    for index, row in enumerate(table[settings.label]):
        words = rows.word_ids(index)
        if len(row) != len(table[settings.tokens][index]):
            raise DataError(
                f"{settings.dataset!r}: row {index} has {len(table[settings.tokens][index])} words and {len(row)} labels; "
                f"give one label per word."
            )
        for place, word in enumerate(words):
            if word is not None and word != (words[place - 1] if place else None):
                labels[index, place] = _class(row[word], names, index, settings)
    return labels


def _tokenizer(settings: HfDataSettings) -> Any:
    tokenizer = _processor("AutoTokenizer", "tokenizer", settings)
    if settings.tokens is not None and not tokenizer.is_fast:
        raise DataError(
            f"`tokens` needs a fast tokenizer, and {settings.processor!r} has none; add its tokenizer.json."
        )
    tokenizer.padding_side = "right"
    if settings.pad_token is not None:
        tokenizer.pad_token = settings.pad_token
    if tokenizer.pad_token is None:
        raise DataError(
            f"the tokenizer {settings.processor!r} has no padding token; name one as `pad_token`, for example "
            f"{tokenizer.eos_token!r}."
        )
    return tokenizer


# --- images and recordings --------------------------------------------------------------------------------------------


def _images(table: Any, settings: HfDataSettings) -> dict[str, Array]:
    processor = _processor("AutoImageProcessor", "image processor", settings)

    def prepare(images: Sequence[Any]) -> dict[str, Array]:
        return dict(processor([image.convert("RGB") for image in images], return_tensors="np"))

    return _prepared(table, settings.image, prepare, ("pixel_values",), settings)


def _recordings(table: Any, settings: HfDataSettings) -> dict[str, Array]:
    extractor = _processor("AutoFeatureExtractor", "feature extractor", settings)
    rate = extractor.sampling_rate
    datasets = _require("datasets")
    if isinstance(table.features[settings.audio], datasets.Audio):
        # Resampled by `datasets` to what the network was trained on.
        table = table.cast_column(settings.audio, datasets.Audio(sampling_rate=rate))
    length = {} if settings.seconds is None else {"max_length": round(settings.seconds * rate), "truncation": True}

    def prepare(recordings: Sequence[Any]) -> dict[str, Array]:
        samples = [np.asarray(item if isinstance(item, list) else item["array"], np.float32) for item in recordings]
        lengths = {len(item) for item in samples}
        if not length and len(lengths) > 1 and getattr(extractor, "chunk_length", None) is None:
            raise DataError(
                f"the recordings in {settings.audio!r} have {len(lengths)} lengths; set `seconds` to cut and pad them alike."
            )
        padding = "max_length" if length else True
        return dict(extractor(samples, sampling_rate=rate, padding=padding, return_tensors="np", **length))

    return _prepared(table, settings.audio, prepare, tuple(extractor.model_input_names), settings)


def _prepared(
    table: Any,
    column: str | None,
    prepare: Callable[[Sequence[Any]], dict[str, Array]],
    names: Sequence[str],
    settings: HfDataSettings,
) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {}
    for rows in _chunks(table, column):
        try:
            with quiet():
                made = prepare(rows)
        except DataError:
            raise
        except Exception as error:  # decoders and processors raise nearly anything
            raise DataError(
                f"examples of column {column!r} of {settings.dataset!r} cannot be prepared ({_said(error)}); see whether "
                f"{settings.processor!r} is for such data."
            ) from error
        kept = {name: made[name] for name in names if name in made}
        if not parts:
            _refuse(len(table), sum(value[0].nbytes for value in kept.values()), settings)
        for name, value in kept.items():
            kind = np.float32 if value.dtype.kind == "f" else np.int64
            parts.setdefault(name, []).append(np.asarray(value, kind))
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def _chunks(table: Any, column: str | None) -> Iterator[list[Any]]:
    for start in range(0, len(table), CHUNK):
        try:
            rows = table[start : start + CHUNK][column]
        except ImportError as error:  # datasets decodes recordings through torchcodec
            raise DataError(
                f"column {column!r} cannot be decoded ({_said(error)}); install what it names, or store lists of samples."
            ) from error
        yield list(rows)


# --- labels and helpers -----------------------------------------------------------------------------------------------


def _labels(table: Any, settings: HfDataSettings) -> Array | None:
    if settings.label is None:
        return None
    values, names = list(table[settings.label]), _class_names(table, settings)
    if all(isinstance(value, float) for value in values):
        return np.array(values, np.float32)
    return np.array([_class(value, names, row, settings) for row, value in enumerate(values)], np.int64)


def _class_names(table: Any, settings: HfDataSettings) -> Sequence[str]:
    """Return the words of the labels in order: those given, else the data set's own."""
    feature = table.features[settings.label]
    return settings.classes or getattr(getattr(feature, "feature", feature), "names", None) or ()


def _class(value: Any, names: Sequence[str], row: int, settings: HfDataSettings) -> int:
    where = f"{settings.dataset!r}, column {settings.label!r}, row {row}"
    if isinstance(value, str):
        if value not in names:
            raise DataError(f"{where}: {unknown_name('label', value, names)} List the words in order in `classes`.")
        return list(names).index(value)
    if not isinstance(value, (int, np.integer)) or value < 0:
        raise DataError(
            f"{where}: the label is {value!r}; labels are classes from 0 on. A split without labels (-1) serves for "
            f"`calibration` only, with `label: null`."
        )
    return int(value)


def _processor(auto: str, what: str, settings: HfDataSettings) -> Any:
    transformers = _require("transformers")
    try:
        with quiet():
            return getattr(transformers, auto).from_pretrained(settings.processor, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise DataError(
            f"the {what} {settings.processor!r} cannot be loaded ({_said(error)}). Give a folder, relative to the working "
            f"directory, or a name on the hub, as `processor`."
        ) from error


def _refuse(rows: int, bytes_each: int, settings: HfDataSettings) -> None:
    if rows * bytes_each > settings.max_bytes:
        raise DataError(
            f"{settings.dataset!r}: {rows} examples take {rows * bytes_each} bytes once prepared, more than the "
            f"{settings.max_bytes} of `max_bytes`; read fewer (`split: {re.split(r'[^A-Za-z0-9_]', settings.split)[0]}[:1000]`) "
            f"or raise it."
        )


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"the source 'hf' needs {module!r}, which cannot be imported ({error}); pip install 'secateurs[hf]'."
        ) from error


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    """Keep the progress bars of `datasets` off the terminal."""
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
