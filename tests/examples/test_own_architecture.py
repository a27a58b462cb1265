"""The attention that no built-in description knows: left alone without the plugin, pruned whole and certified with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import secateurs

own = pytest.importorskip("own_architecture")


@pytest.fixture(scope="module")
def trained():
    learn, judge = own.digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = own.Classifier()
        own.train(model, learn, epochs=2)
    return model.eval(), learn, judge


def heads(result):
    return [layer.attention.n_heads for layer in result.model.layers]


def test_heads_go_only_where_they_are_described(trained, tmp_path):
    model, learn, judge = trained
    without, described = own.prune(model, learn[:5]), own.prune(model, learn[:5], own.Heads())
    assert heads(without) == [own.HEADS] * own.LAYERS
    assert any("layers.0.attention" in item.where for record in without.report.passes for item in record.skipped)
    assert heads(described) == [4] * own.LAYERS
    [record] = described.report.passes
    assert record.certificate.holds
    for layer in described.model.layers:
        assert layer.attention.wq.out_features == layer.attention.wo.in_features == 4 * own.DIM
    described.save(tmp_path / "out")
    again = secateurs.load(tmp_path / "out", build=own.Classifier())
    images = judge[0][0]
    with torch.no_grad():
        assert torch.equal(again.eval()(images), described.model(images))


def test_a_wrong_description_is_refused_not_believed(trained):
    model, learn, _ = trained

    class Wrong(own.Heads):
        @secateurs.hookimpl
        def secateurs_describe_attention(self, module):
            found = super().secateurs_describe_attention(module)
            return found and dataclasses.replace(found, output="wq", queries="wo")

    result = own.prune(model, learn[:5], Wrong())
    assert heads(result) == [own.HEADS] * own.LAYERS
    images = learn[0][0]
    with torch.no_grad():
        assert result.model(images).isfinite().all()
