"""The table of architectures: small, seeded networks of many families, built from their configurations, never downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from convolutional import NETWORKS
from torch import nn

VOCABULARY = 97


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        name: of the row.
        build: returns the network.
        inputs: number of examples and a length to the inputs, by name.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Mapping[str, torch.Tensor]]


def tokens(n: int, length: int) -> dict[str, torch.Tensor]:
    """Return token ids with padding on the right of every other example."""
    mask = torch.ones(n, length, dtype=torch.long)
    mask[::2, length - 2 :] = 0
    return {"input_ids": torch.randint(3, VOCABULARY - 1, (n, length)), "attention_mask": mask}


def pairs(n: int, length: int) -> dict[str, torch.Tensor]:
    """Return token ids for an encoder and a decoder."""
    return {**tokens(n, length), "decoder_input_ids": torch.randint(3, VOCABULARY - 1, (n, 5))}


def pixels(size: int, channels: int = 3) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Return a maker of images of one size."""
    return lambda n, _: {"pixel_values": torch.randn(n, channels, size, size)}


def hugging_face(
    name: str, model: str, config: str, inputs: Callable[[int, int], Mapping[str, torch.Tensor]], **options: Any
) -> Architecture:
    """Return a row for a model of transformers."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return network

    return Architecture(name, build, inputs)


_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_CAUSAL = {**_TEXT, **_SMALL, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {**_CAUSAL, "num_key_value_heads": 2}
_IMAGE = {**_SMALL, "image_size": 16, "patch_size": 4}

HUGGING_FACE = [
    hugging_face("bert", "BertForSequenceClassification", "BertConfig", tokens, **_TEXT, **_SMALL),
    hugging_face(
        "roberta", "RobertaForSequenceClassification", "RobertaConfig", tokens, **_TEXT, **_SMALL, pad_token_id=0
    ),
    hugging_face(
        "electra", "ElectraForSequenceClassification", "ElectraConfig", tokens, **_TEXT, **_SMALL, embedding_size=32
    ),
    hugging_face(
        "albert", "AlbertForSequenceClassification", "AlbertConfig", tokens, **_TEXT, **_SMALL, embedding_size=16
    ),
    hugging_face("mpnet", "MPNetForSequenceClassification", "MPNetConfig", tokens, **_TEXT, **_SMALL),
    hugging_face(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        tokens,
        **_TEXT,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
    ),
    hugging_face("bert-lm-tied", "BertForMaskedLM", "BertConfig", tokens, **_TEXT, **_SMALL),
    hugging_face(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        tokens,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
    ),
    hugging_face("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", tokens, **_CAUSAL),
    hugging_face(
        "gpt-neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        tokens,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        intermediate_size=64,
        max_position_embeddings=64,
        use_cache=False,
    ),
    hugging_face(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        tokens,
        **_TEXT,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        use_cache=False,
        pad_token_id=0,
    ),
    hugging_face(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        tokens,
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        use_cache=False,
    ),
    hugging_face("llama", "LlamaForCausalLM", "LlamaConfig", tokens, **_CAUSAL),
    hugging_face("llama-gqa", "LlamaForCausalLM", "LlamaConfig", tokens, **_GQA),
    hugging_face("mistral", "MistralForCausalLM", "MistralConfig", tokens, **_GQA),
    hugging_face("qwen2", "Qwen2ForCausalLM", "Qwen2Config", tokens, **_GQA),
    hugging_face("qwen3", "Qwen3ForCausalLM", "Qwen3Config", tokens, **_GQA, head_dim=8),
    hugging_face("gemma", "GemmaForCausalLM", "GemmaConfig", tokens, **_GQA, head_dim=8),
    hugging_face("phi", "PhiForCausalLM", "PhiConfig", tokens, **_CAUSAL),
    hugging_face(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        pairs,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        d_ff=64,
        use_cache=False,
        decoder_start_token_id=0,
    ),
    hugging_face(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        pairs,
        **_TEXT,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        use_cache=False,
    ),
    hugging_face("vit", "ViTForImageClassification", "ViTConfig", pixels(16), **_IMAGE),
    hugging_face("deit", "DeiTForImageClassification", "DeiTConfig", pixels(16), **_IMAGE),
    hugging_face("beit", "BeitForImageClassification", "BeitConfig", pixels(16), **_IMAGE),
    hugging_face(
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        pixels(32),
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    hugging_face(
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        pixels(32),
        hidden_sizes=[16, 32],
        depths=[2, 2],
        num_stages=2,
    ),
    hugging_face(
        "resnet-basic",
        "ResNetForImageClassification",
        "ResNetConfig",
        pixels(32),
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        layer_type="basic",
    ),
    hugging_face(
        "resnet-bottleneck",
        "ResNetForImageClassification",
        "ResNetConfig",
        pixels(32),
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 2],
    ),
    hugging_face(
        "regnet",
        "RegNetForImageClassification",
        "RegNetConfig",
        pixels(32),
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        groups_width=8,
    ),
    hugging_face(
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        pixels(32),
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    hugging_face(
        "poolformer",
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        pixels(32),
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
    ),
    hugging_face("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", pixels(16), **_IMAGE),
    hugging_face(
        "dinov2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        pixels(16),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=16,
        patch_size=4,
    ),
]

HAND_WRITTEN = [
    Architecture(name, build, lambda n, _: {"input": torch.randn(n, 3, 16, 16)}) for name, build in NETWORKS.items()
]

ARCHITECTURES = [*HAND_WRITTEN, *HUGGING_FACE]
