"""stories260K, the tiny Llama of `examples/tiny_llama.py`: its trained weights, what it writes, and how well it predicts.

The weights are not in the repository: `shared/data/weights_stories260k_llama.safetensors`, beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from tiny_llama import BOS, HEADS, HIDDEN, KV_HEADS, LAYERS, WIDTH, build, sample  # noqa: E402 - after the path

__all__ = [
    "DATA",
    "HEADS",
    "HIDDEN",
    "KV_HEADS",
    "LAYERS",
    "WEIGHTS",
    "WIDTH",
    "load",
    "perplexity",
    "sample",
    "write",
]

DATA = ROOT.parent / "shared" / "data"
WEIGHTS = DATA / "weights_stories260k_llama.safetensors"


def load() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return build(WEIGHTS)


def write(network: Any, length: int, *, cache: bool = True, **options: Any) -> Tensor:
    """Return the text that the network writes greedily, token ids of shape `(1, length + 1)` or less if it ends before."""
    with torch.no_grad():
        start = torch.full((1, 1), BOS)
        written: Tensor = network.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=length,
            use_cache=cache,
            do_sample=False,
            **options,
        )
    return written


def perplexity(network: Any, texts: Tensor) -> float:
    """Return the exponential of the mean cross-entropy of each token given those before it."""
    with torch.no_grad():
        scores = network(input_ids=texts).logits[:, :-1]
    return float(nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten()).exp())
