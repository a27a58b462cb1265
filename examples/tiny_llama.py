"""stories260K, a real tiny Llama that writes children's stories, as a folder of Hugging Face with data that it wrote itself.

    python examples/tiny_llama.py --weights ../shared/data/weights_stories260k_llama.safetensors --output tiny_llama
    secateurs run examples/tiny_llama.yaml --set folder=tiny_llama --output pruned

5 layers of width 64, 8 query heads on 4 key-value heads, 172 gated neurons, a vocabulary of 512 that is tied to the head; trained by Andrej
Karpathy (llama2.c). The weights are expected under the names that he gave them, as safetensors. What the network writes at temperature 1
stands in for its training text, with one seed for calibration and another for evaluation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["BOS", "build", "hugging_face_names", "sample", "write_folder"]

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 5, 64, 8, 4, 172, 512
BOS = 1
"""The token that every story starts with."""
IGNORED = -100
"""Label of a position that does not count."""
LENGTH, CALIBRATION, EVALUATION = 128, 160, 128


def build(weights: Path) -> nn.Module:
    """Return the trained network, in evaluation mode.

    Args:
        weights: the safetensors file, with the names of llama2.c.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=0,
    )
    network: nn.Module = transformers.LlamaForCausalLM(config)
    network.load_state_dict(hugging_face_names(load_file(weights)), strict=True)
    return network.eval()


def hugging_face_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under Hugging Face's names."""
    found = {"model.embed_tokens.weight": weights["tok_embeddings.weight"], "model.norm.weight": weights["norm.weight"]}
    found["lm_head.weight"] = weights["tok_embeddings.weight"]
    names = {
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(LAYERS):
        old, new = f"layers.{layer}", f"model.layers.{layer}"
        found |= {f"{new}.{name}.weight": weights[f"{old}.{short}.weight"] for short, name in names.items()}
        found[f"{new}.self_attn.q_proj.weight"] = _halves(weights[f"{old}.wq.weight"], HEADS)
        found[f"{new}.self_attn.k_proj.weight"] = _halves(weights[f"{old}.wk.weight"], KV_HEADS)
    return found


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Turn interleaved rotary pairs, (x0, y0, x1, y1, ...) in each head, into the two halves that Hugging Face rotates."""
    return weight.view(heads, -1, 2, WIDTH).transpose(1, 2).reshape(weight.shape)


def sample(network: Any, length: int, texts: int, seed: int) -> Tensor:
    """Return texts drawn at temperature 1, token ids of shape `(texts, length)`; the same seed draws the same."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        start = torch.full((texts, 1), BOS)
        written: Tensor = network.generate(
            start,
            attention_mask=torch.ones_like(start),
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            do_sample=True,
            top_k=0,
            use_cache=True,
        )
    return written


def write_folder(network: Any, folder: Path, sizes: dict[str, int], length: int = LENGTH) -> None:
    """Write the network as Hugging Face does, and `NAME.npz` with texts and the token that follows each position.

    Args:
        network: to write, and to write texts with.
        folder: to write into.
        sizes: texts of each file, by name; the seeds are 0, 1, ... in this order.
        length: tokens of a text.
    """
    network.save_pretrained(folder)
    for seed, (name, texts) in enumerate(sizes.items()):
        tokens = sample(network, length, texts, seed).numpy()
        labels = np.full_like(tokens, IGNORED)
        labels[:, :-1] = tokens[:, 1:]
        np.savez(folder / f"{name}.npz", input_ids=tokens, labels=labels)


def main(arguments: list[str] | None = None) -> int:
    """Write the folder and return the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="stories260K as safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    write_folder(build(given.weights), given.output, {"calibration": CALIBRATION, "evaluation": EVALUATION})
    print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
