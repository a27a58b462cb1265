"""Every architecture is pruned safely or refused with a reason: no wrong result, no hang, no crash, and most get smaller."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from table import ARCHITECTURES, HUGGING_FACE
from torch import nn

import secateurs
from secateurs.errors import ExportError
from secateurs.forward import call, inference, output_tensors, to_dataset
from secateurs_adapters.export import DynamoExporter

LEFT = 0.8
STUBBORN = {"resnet-groupnorm": "every unit goes through a GroupNorm, whose statistics mix the units of a group"}
"""Architectures of which more than `LEFT` stays, each with the reason; at most a tenth of the table."""
HEADS = ("embed", "wte", "wpe", "shared", "lm_head", "classifier", "score", "head.", "out.")


@pytest.fixture(params=ARCHITECTURES, ids=lambda row: row.name)
def case(request):
    row = request.param
    if row in HUGGING_FACE:
        pytest.importorskip("transformers", reason="needs the extra `hf`")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = row.build().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # so that outputs depend on inputs: initialisations are often too small for that
            nn.init.normal_(parameter, std=1.5 / float(np.sqrt(np.prod(parameter.shape[1:]))))
    example = dict(row.inputs(4, 12))
    batches = [dict(row.inputs(16, 12)) for _ in range(3)]
    if list(example) == ["input"]:
        example, batches = example["input"], [batch["input"] for batch in batches]
    return row, model, example, batches


def weights(model: nn.Module) -> int:
    """Count the parameters outside embeddings and output heads."""
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in HEADS))


def outputs(model: nn.Module, example) -> list[torch.Tensor]:
    with inference(model):
        return output_tensors(call(model, to_dataset(example)))


@pytest.mark.hf
def test_it_is_pruned_safely_or_refused_with_a_reason(case, tmp_path):
    row, model, example, batches = case
    before = outputs(model, example)
    result = secateurs.prune(model, example, batches, passes=[{"mi-nodes": {"target_units": 0.5}}])
    record = result.report.passes[0]
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, example), strict=True)), (
        "the model given was changed"
    )
    assert all(item.reason for item in record.skipped)
    if record.edits:
        assert record.certificate.holds
    result.save(tmp_path)
    again = secateurs.load(tmp_path, build=copy.deepcopy(model))
    got = outputs(result.model, example)
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(again, example), strict=True)), (
        "it does not reload exactly"
    )
    left = weights(result.model) / weights(model)
    assert left <= LEFT or row.name in STUBBORN, [(item.where, item.reason) for item in record.skipped]
    _exports(row, model, result.model, example, tmp_path)


def _exports(row, model, pruned, example, folder):
    """The file of the pruned network agrees with it at other batch sizes, wherever the original can be exported at all."""
    data = to_dataset(example)
    try:
        artifact = DynamoExporter()(pruned, data, folder / "model.onnx", opset=20)
    except ExportError as error:
        with pytest.raises(ExportError):
            DynamoExporter()(model, data, folder / "original.onnx", opset=20)
        pytest.skip(f"{row.name} cannot be exported, pruned or not: {error}")
    assert artifact.parity.max_abs <= artifact.parity.tolerance


@pytest.mark.hf
def test_a_block_goes_safely_or_not_at_all(case):
    _, model, example, batches = case
    result = secateurs.prune(
        model,
        example,
        batches,
        passes=[{"cka-cluster": {"threshold": 0.0, "max_blocks": 1, "tolerance": 1.0}}],
        evaluate=lambda _: 1.0,
    )
    record = result.report.passes[0]
    assert record.edits <= 1
    assert all(item.reason for item in record.skipped)
    if record.edits:
        assert record.certificate.holds
        assert weights(result.model) < weights(model)


def test_few_architectures_stay_large():
    assert len(STUBBORN) <= len(ARCHITECTURES) / 10
    assert set(STUBBORN) <= {row.name for row in ARCHITECTURES}
