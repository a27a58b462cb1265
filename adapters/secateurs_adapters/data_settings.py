"""The options of the built-in data sources: what a role of a recipe says beside `source` and `samples`.

Arguments are documented once, here; `secateurs_adapters.datasets` reads the data. Paths are relative to the working
directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["DIGITS_NORMALISE", "DigitsSettings", "ImageFolderSettings", "Normalise", "NpzSettings", "TsvSettings"]

MAX_BYTES = 8 * 2**30


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Normalise(_Settings):
    """Normalisation of pictures whose values lie in [0, 1]: (x - mean) / std, channel by channel."""

    mean: tuple[float, ...] = Field(min_length=1, description="one mean per channel, or one for all")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1, description="as many standard deviations")

    @model_validator(mode="after")
    def _same_length(self) -> Normalise:
        if len(self.mean) != len(self.std):
            raise ValueError(f"`mean` has {len(self.mean)} values, `std` {len(self.std)}; give one of each per channel")
        return self


DIGITS_NORMALISE = Normalise(mean=(0.3052,), std=(0.376,))
"""Mean and standard deviation of the training digits."""


class DigitsSettings(_Settings):
    """Options of `digits`: scikit-learn's 1,797 handwritten digits of 8x8 grey pixels."""

    split: Literal["train", "evaluation"] = Field(
        default="train",
        description="1,347 images for everything but the verdict, or the 450 for evaluation; stratified",
    )


class NpzSettings(_Settings):
    """Options of `npz`: arrays written with `numpy.savez`; images and labels, or named inputs as they are."""

    file: Path = Field(description="the .npz file")
    images_key: str = Field(default="images", description="array of images; uint8 is divided by 255, floats stay")
    labels_key: str | None = Field(default="labels", description="array of labels; null for data without labels")
    normalise: Normalise | None = Field(default=None, description="`mean` and `std` per channel, of values in [0, 1]")
    layout: Literal["NHWC", "NCHW"] | None = Field(
        default=None,
        description="order of the images' axes; null takes the one axis with 1 or 3 entries for the channels",
    )
    inputs: tuple[str, ...] = Field(
        default=(), description="read these arrays as they are, in this order, instead of images"
    )
    max_bytes: int = Field(
        default=MAX_BYTES, gt=0, description="refuse arrays that take more than this once decompressed"
    )

    @model_validator(mode="after")
    def _inputs_or_images(self) -> NpzSettings:
        if self.inputs and (self.normalise is not None or self.layout is not None):
            raise ValueError("`normalise` and `layout` are for images; leave them out where `inputs` is given")
        return self


class ImageFolderSettings(_Settings):
    """Options of `image_folder`: one sub-folder per class, with the images of that class directly in it."""

    folder: Path = Field(description="the folder with one sub-folder per class")
    size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = Field(
        description="[height, width] that every image is scaled to (bilinear, both sides alike)"
    )
    normalise: Normalise | None = Field(default=None, description="`mean` and `std` per channel, of values in [0, 1]")
    channels: Literal[1, 3] = Field(default=3, description="1 for grey, 3 for RGB")
    classes: tuple[str, ...] = Field(
        default=(), description="names of the sub-folders by label; empty: those there, sorted"
    )
    max_bytes: int = Field(
        default=MAX_BYTES, gt=0, description="refuse a folder that takes more than this once decoded"
    )


class TsvSettings(_Settings):
    """Options of `tsv`: one text per line, columns separated by tabs, no quoting."""

    file: Path = Field(description="the table")
    tokenizer: str = Field(description="folder of a Hugging Face tokenizer, or the name of one that is cached here")
    text: int | str = Field(default=0, description="column of the text: position from 0, or its name in the first line")
    label: int | str | None = Field(
        default=1, description="column of the label, likewise; null for data without labels"
    )
    header: bool | None = Field(
        default=None, description="whether the first line names the columns; null: if one is named"
    )
    classes: tuple[str, ...] = Field(default=(), description="words of the labels in order; empty: labels are integers")
    max_length: int = Field(default=128, gt=0, description="tokens per text: longer texts are cut, shorter ones padded")
    max_bytes: int = Field(default=MAX_BYTES, gt=0, description="refuse a table that is larger than this")
