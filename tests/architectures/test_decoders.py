"""Decoders as people use them: with a cache, with tied embeddings, pruned more than once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateurs
from secateurs.passes.base import Pass, Proposal
from secateurs.passes.depth import renumbered
from secateurs.plan import DropBlock, Plan

pytestmark = pytest.mark.hf
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")


def tokens(n):
    return {"input_ids": torch.randint(1, 90, (n, 12)), "attention_mask": torch.ones(n, 12, dtype=torch.long)}


class DropFirst(Pass):
    """Drops the layer that a cache is measured by."""

    name = "drop-first"
    done = False

    def propose(self, context):
        plan = Plan() if self.done else Plan(edits=(DropBlock(path="model.layers.0"),))
        self.done = True
        return Proposal(plan + renumbered(context.model, plan))


@pytest.fixture(scope="module")
def pruned():
    """Return a Llama with grouped queries and tied embeddings, its calibration, and what two passes left of it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25)
    batches = [tokens(16) for _ in range(3)]
    return (
        model,
        batches,
        secateurs.prune(model, batches[0], batches, [DropFirst(), {"magnitude": {"target_units": 0.5}}]),
    )


def test_both_passes_are_certified_although_the_network_returns_a_cache(pruned):
    records = pruned[2].report.passes
    assert [record.edits for record in records] == [1, 4], [record.skipped for record in records]
    assert all(record.certificate.holds for record in records)


def test_decoding_with_a_cache_is_decoding_without(pruned):
    model, x = pruned[2].model, tokens(2)["input_ids"]
    with torch.no_grad():
        whole = model(x).logits
        first = model(x[:, :6], use_cache=True)
        second = model(x[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=0)


def test_refit_leaves_tied_embeddings_alone(pruned):
    model, batches, _ = pruned
    result = secateurs.prune(model, batches[0], batches, [{"mi-nodes": {"target_units": 0.5}}])
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert torch.equal(result.model.lm_head.weight, model.lm_head.weight)


def test_heads_can_go_again(pruned):
    _, batches, once = pruned
    again = secateurs.prune(once.model, batches[0], batches, [{"mi-nodes": {"target_units": 0.5}}])
    record = again.report.passes[0]
    assert record.edits == 4, record.skipped
    assert record.certificate.holds
    assert [layer.self_attn.k_proj.out_features for layer in again.model.model.layers[1:]] == [4, 4]
