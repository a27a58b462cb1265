"""Saving for plain `from_pretrained`: what a configuration describes comes back bit by bit where there is no Secateurs; the rest is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import secateurs
from secateurs.errors import ModelError
from secateurs.plan import DropBlock, Plan
from secateurs.surgery import applied

transformers = pytest.importorskip("transformers")
from secateurs_adapters.huggingface import save_pretrained  # noqa: E402 - it needs transformers

pytestmark = pytest.mark.hf

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
RELOAD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("secateurs", "secateurs_adapters"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
sys.path[:] = [path for path in sys.path if not path.rstrip("/").endswith(("plugin", "adapters"))]
try:
    import secateurs
except ImportError:
    pass
else:
    raise SystemExit("secateurs can be imported")

import numpy as np
import torch
import transformers

folder, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder + "/saved").eval()
inputs = {name: torch.from_numpy(value) for name, value in np.load(folder + "/inputs.npz").items()}
with torch.no_grad():
    outputs = model(**inputs)
found = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
np.save(folder + "/outputs.npy", found.numpy())
"""


def scaled(network):
    """Give a network weights that make its outputs differ from example to example."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.eval()


def tokens(n, seed=0):
    return {"input_ids": torch.randint(3, 97, (n, 10), generator=torch.Generator().manual_seed(seed))}


def pixels(n, seed=0):
    return {"pixel_values": torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def bert(**more):
    config = transformers.BertConfig(vocab_size=97, max_position_embeddings=64, **{**SMALL, **more})
    return scaled(transformers.BertModel(config))


def vit():
    return scaled(transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **SMALL)))


def llama():
    config = transformers.LlamaConfig(
        vocab_size=97, max_position_embeddings=64, head_dim=8, use_cache=False, pad_token_id=0, **{**SMALL, "num_attention_heads": 8},
        num_key_value_heads=4,
    )  # fmt: skip
    return scaled(transformers.LlamaForCausalLM(config))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    return scaled(transformers.GPT2LMHeadModel(config))


def qwen2():
    """Return a network whose configuration holds a list with one entry per layer, and which dense form has no `head_dim`."""
    config = transformers.Qwen2Config(
        vocab_size=97, max_position_embeddings=64, use_cache=False, pad_token_id=0, num_key_value_heads=2, **SMALL
    )
    return scaled(transformers.Qwen2ForCausalLM(config))


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=97, max_position_embeddings=64, dim=32, n_layers=4, n_heads=4, hidden_dim=64
    )
    return scaled(transformers.DistilBertModel(config))


def dinov2():
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4
    )
    return scaled(transformers.Dinov2Model(config))


def pruned(model, inputs, *, layers=True, **options):
    nodes = {"target_units": 0.5, "uniform": True, "refit": "none", **options}
    if nodes.get("target_macs"):
        nodes["target_units"] = None
    drop = [{"cka-cluster": {"threshold": 0.0, "max_blocks": 1, "tolerance": 1.0}}] if layers else []
    return secateurs.prune(
        model, inputs(2), [inputs(24, seed=1)], passes=[*drop, {"mi-nodes": nodes}], evaluate=lambda _: 1.0
    )


def elements(returned):
    """Return what a bypass must know: layers return tuples in transformers 4, some of them tensors in 5."""
    return len(returned) if isinstance(returned, tuple) else None


def first(outputs):
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).detach()


@pytest.mark.parametrize(
    ("build", "inputs", "auto", "heads", "told"),
    [
        (bert, tokens, "AutoModel", False, {"num_hidden_layers": 3, "intermediate_size": 32, "num_attention_heads": 4}),
        (vit, pixels, "AutoModelForImageClassification", False, {"num_hidden_layers": 3, "intermediate_size": 32}),
        (
            llama,
            tokens,
            "AutoModelForCausalLM",
            True,
            {
                "num_hidden_layers": 3,
                "intermediate_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
        ),
        (gpt2, tokens, "AutoModelForCausalLM", False, {"n_layer": 3, "n_inner": 64, "n_head": 4}),
        (
            qwen2,
            tokens,
            "AutoModelForCausalLM",
            True,
            {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        ),
        (distilbert, tokens, "AutoModel", False, {"n_layers": 3, "hidden_dim": 32}),
    ],
)
def test_a_uniform_network_comes_back_exactly_without_secateurs(tmp_path, build, inputs, auto, heads, told):
    result = pruned(build(), inputs, heads=heads)
    assert sum(edit.edit == "drop_block" for edit in result.plan.edits) == 1
    assert sum(edit.edit == "remove_units" for edit in result.plan.edits) >= 3
    before = result.model.config.to_dict()
    save_pretrained(result.model, result.plan, tmp_path / "saved")
    assert result.model.config.to_dict() == before, "the network given is not changed"

    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: config[name] for name in told} == told
    assert len(config.get("layer_types", "123")) == 3
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    examples = inputs(5, seed=7)
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in examples.items()})
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path), auto], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = first(result.model(**examples)).numpy()
    assert np.abs(expected - expected[:1]).max() > 1e-3, "outputs that are all the same would prove nothing"
    assert np.abs(expected - np.load(tmp_path / "outputs.npy")).max() == 0.0


def test_a_width_that_the_configuration_holds_as_a_ratio(tmp_path):
    result = pruned(dinov2(), pixels, heads=False, layers=False)
    save_pretrained(result.model, result.plan, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["mlp_ratio"] == 1.0


def test_a_configuration_that_counts_its_layers_twice_is_refused(tmp_path):
    refused(pruned(dinov2(), pixels, heads=False), tmp_path / "saved", "does not come back through `from_pretrained`")


def refused(result, folder, match):
    with pytest.raises(ModelError, match=match) as caught:
        save_pretrained(result.model, result.plan, folder)
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []
    return str(caught.value)


def test_a_network_whose_layers_differ_is_refused_with_their_widths(tmp_path):
    model = bert()
    result = pruned(model, tokens, heads=False, layers=False)
    third = next(edit for edit in result.plan.edits if edit.edit == "remove_units" and ".2." in edit.root)
    plan = Plan(edits=tuple(e for e in result.plan.edits if e.edit == "remove_units" and e is not third))
    with torch.no_grad():
        returned = model.encoder.layer[0](torch.randn(1, 4, 32))
    plan += Plan(edits=(DropBlock(path="encoder.layer.0", elements=elements(returned)),))
    uneven = secateurs.PruneResult(applied(model, plan), plan, result.report)
    said = refused(uneven, tmp_path / "saved", "no BertConfig describes the pruned BertModel")
    assert "encoder.layer.*.intermediate.dense.weight is (32, 32) in 1; 3 and (64, 32) in 2" in said
    assert "`uniform: true`" in said
    assert "`secateurs.load`" in said


def test_what_no_configuration_describes_can_be_left_alone(tmp_path):
    model = scaled(
        transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=97, max_position_embeddings=64, **SMALL)
        )
    )
    said = refused(pruned(model, tokens, heads=False), tmp_path / "saved", "no BertConfig")
    assert said.endswith('Leave alone what no configuration describes: `ignored_layers: ["bert.pooler.dense"]`.')
    result = pruned(model, tokens, heads=False, ignored_layers=["bert.pooler.dense"])
    save_pretrained(result.model, result.plan, tmp_path / "saved")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert (plain.config.num_hidden_layers, plain.config.intermediate_size) == (3, 32)
    assert torch.equal(first(plain(**tokens(2))), first(result.model(**tokens(2))))


def test_heads_that_the_configuration_ties_to_the_hidden_size_are_refused(tmp_path):
    said = refused(pruned(bert(), tokens), tmp_path / "saved", "no BertConfig")
    assert "attention.self.key.weight is (16, 32)" in said
    assert "where the configuration gives (32, 32)" in said
    assert "`heads: false`" in said


def test_layers_that_depend_on_their_number_are_refused(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        use_cache=False,
        scale_attn_by_inverse_layer_idx=True,
        attn_implementation="eager",
    )
    model = scaled(transformers.GPT2LMHeadModel(config))
    with torch.no_grad():
        returned = model.transformer.h[1](torch.randn(1, 4, 32))
    plan = Plan(edits=(DropBlock(path="transformer.h.1", elements=elements(returned)),))
    result = secateurs.PruneResult(applied(model, plan), plan, None)
    refused(result, tmp_path / "saved", "computes something else after `from_pretrained`")


def test_what_does_not_belong_together_is_refused(tmp_path):
    model = bert()
    plan = Plan(edits=(DropBlock(path="encoder.layer.1"),))
    with pytest.raises(ModelError, match="give the plan that belongs to this network"):
        save_pretrained(model, plan, tmp_path / "saved")
    with pytest.raises(ModelError, match=r"no transformers\.PreTrainedModel"):
        save_pretrained(torch.nn.Linear(2, 2), Plan(), tmp_path / "saved")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not empty"):
        save_pretrained(model, Plan(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- uniform mode -----------------------------------------------------------------------------------------------------------------------


def widths(model):
    return {name: module.out_features for name, module in model.named_modules() if name.endswith("intermediate.dense")}


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_one_width_for_all_layers_meets_a_target_of_macs(allocation):
    options = {"target_macs": 0.8, "allocation": allocation, "grid": 4, "criteria": ["magnitude"]}
    result = pruned(bert(), tokens, layers=False, heads=False, **options)
    assert len(set(widths(result.model).values())) == 1
    assert result.report.ratios.macs <= 0.8
    assert not any("q" in edit.root.rsplit(".", 1)[-1] for edit in result.plan.edits if edit.edit == "remove_units")
    off = [item.where for item in result.report.passes[-1].skipped if "`heads` is off" in item.reason]
    assert len(off) == 4


def test_a_layer_that_cannot_be_pruned_keeps_those_of_its_kind():
    model = bert()
    # One layer reads its feed-forward through a normalisation over it, which mixes the units.
    shape = model.config.intermediate_size
    model.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.Sequential(
        torch.nn.GELU(), torch.nn.LayerNorm(shape, elementwise_affine=False)
    )
    result = pruned(model, tokens, layers=False, heads=False)
    assert set(widths(result.model).values()) == {64}
    reasons = [item.reason for item in result.report.passes[-1].skipped if item.where.endswith("intermediate.dense")]
    assert len(reasons) == 4
    assert sum("`uniform` is on, and 'encoder.layer.1.intermediate.dense'" in reason for reason in reasons) == 3
    assert set(widths(pruned(model, tokens, layers=False, heads=False, uniform=False).model).values()) == {64, 32}
