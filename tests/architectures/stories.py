"""stories260K: a real, tiny Llama by Andrej Karpathy that writes children's stories, under Hugging Face's names.

5 layers of width 64, 8 heads on 4 key-value heads, 172 neurons, a vocabulary of 512 that is tied to the head. The weights are not in the
repository: `shared/data/weights_stories260k_llama.safetensors`, beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = DATA / "weights_stories260k_llama.safetensors"
LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 5, 64, 8, 4, 172
BOS = 1


def load() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
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
    network.load_state_dict(hugging_face_names(load_file(WEIGHTS)), strict=True)
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
        found[f"{new}.self_attn.q_proj.weight"] = halves(weights[f"{old}.wq.weight"], HEADS)
        found[f"{new}.self_attn.k_proj.weight"] = halves(weights[f"{old}.wk.weight"], KV_HEADS)
    return found


def halves(weight: Tensor, heads: int) -> Tensor:
    """Turn interleaved rotary pairs, (x0, y0, x1, y1, ...) in each head, into the two halves that Hugging Face rotates."""
    return weight.view(heads, -1, 2, WIDTH).transpose(1, 2).reshape(weight.shape)


def write(network: Any, length: int, *, texts: int = 1, cache: bool = True, **options: Any) -> Tensor:
    """Return texts that the network writes, token ids of shape `(texts, length + 1)`; greedily, unless the options say otherwise."""
    options = {"do_sample": False, **options}
    with torch.no_grad():
        start = torch.full((texts, 1), BOS)
        written: Tensor = network.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=length, use_cache=cache, **options
        )
    return written


def sample(network: Any, length: int, texts: int, seed: int) -> Tensor:
    """Return texts drawn at temperature 1, shape `(texts, length)`; the same seed draws the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return write(network, length - 1, texts=texts, min_new_tokens=length - 1, do_sample=True, top_k=0)


def perplexity(network: Any, texts: Tensor) -> float:
    """Return the exponential of the mean cross-entropy of each token given those before it."""
    with torch.no_grad():
        scores = network(input_ids=texts).logits[:, :-1]
    return float(nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten()).exp())
