"""The options of Hugging Face networks and data sets in a recipe: what `model` and a role say beside the name.

Arguments are documented once, here; `secateurs_adapters.hf_models` and `secateurs_adapters.hf_data` do the work.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateurs_adapters.data_settings import MAX_BYTES

__all__ = ["HfDataSettings", "HfModelSettings", "Task"]

Task = Literal[
    "text-classification",
    "token-classification",
    "image-classification",
    "audio-classification",
    "causal-lm",
    "seq2seq-lm",
]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HfModelSettings(_Settings):
    """The `arguments` of `model: {hf: ...}`; `task` and `revision` may also stand beside `hf`."""

    task: Task | None = Field(
        default=None, description="what the network is for; null takes the class that its configuration names"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub; null is `main`")
    pretrained: bool = Field(default=True, description="read the weights; false leaves them random, from the seed")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of the weights in memory")
    attention: Literal["sdpa", "eager"] | None = Field(
        default=None, description="how attention is computed; null is sdpa where the network has it. Both export"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="attributes of the configuration to change, for example `num_labels`"
    )


class HfDataSettings(_Settings):
    """Options of `hf`: a data set of the hub, or local files, read by `datasets`."""

    dataset: str = Field(
        description="name on the hub, a folder of data files or of `save_to_disk`, or a json, jsonl, csv, tsv, parquet "
        "or arrow file"
    )
    subset: str | None = Field(default=None, description="the configuration of a data set that has several")
    split: str = Field(default="train", description="as `datasets` has it: `train`, `train[:2000]`, `validation`")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub; null is `main`")
    processor: str | None = Field(
        default=None,
        description="folder or name of the tokenizer, image processor or feature extractor; null is the network's own",
    )
    text: str | None = Field(default=None, description="column of the text")
    pair: str | None = Field(default=None, description="column of a second text that belongs to the first")
    tokens: str | None = Field(default=None, description="column of lists of words, each of which has a label")
    image: str | None = Field(default=None, description="column of images")
    audio: str | None = Field(
        default=None, description="column of recordings: audio, or lists of samples at the extractor's rate"
    )
    label: str | None = Field(
        default="label", description="column of the label (of lists with `tokens`); null for data without labels"
    )
    classes: tuple[str, ...] = Field(default=(), description="words of the labels in order; empty: the data set's own")
    next_token: bool = Field(default=False, description="the label of every token is the next one (causal-lm)")
    target: str | None = Field(default=None, description="column of the text to be written (seq2seq-lm)")
    max_length: int = Field(default=128, gt=1, description="tokens per text: longer texts are cut, shorter ones padded")
    seconds: float | None = Field(
        default=None, gt=0, description="of each recording: longer ones are cut, shorter ones padded"
    )
    pad_token: str | None = Field(default=None, description="the padding token of a tokenizer that has none")
    max_bytes: int = Field(default=MAX_BYTES, gt=0, description="refuse data that takes more than this once prepared")

    @model_validator(mode="after")
    def _one_kind(self) -> HfDataSettings:
        given = [name for name in ("text", "tokens", "image", "audio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"name one column of inputs as `text`, `tokens`, `image` or `audio`; got {', '.join(given) or 'none'}"
            )
        for name in ("pair", "target", "next_token"):
            if getattr(self, name) and self.text is None:
                raise ValueError(f"`{name}` goes with `text`, not with `{given[0]}`")
        if self.next_token + (self.target is not None) + (self.pair is not None) > 1:
            raise ValueError("give only one of `next_token`, `target` and `pair`")
        if (self.next_token or self.target is not None) and "label" in self.model_fields_set:
            raise ValueError("`next_token` and `target` make the labels; leave out `label`")
        return self
