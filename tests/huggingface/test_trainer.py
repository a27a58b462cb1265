"""Pruning inside a Trainer: the network, its optimiser and its schedule go on as if they had been built that way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tiny_hf import SMALL, scaled

import secateurs
from secateurs.errors import ModelError, RecipeError
from secateurs.plan import DropBlock
from secateurs_adapters.trainer_callback import PruneCallback, prepare_resume, prune_in_place, prune_trainer

PASSES = [
    {"cka-cluster": {"threshold": 0.0, "max_blocks": 1, "tolerance": 1.0, "refit": "none"}},
    {"magnitude": {"target_units": 0.5, "heads": False, "refit": "none"}},
]
HOW = {"evaluate": lambda _: 1.0}


@pytest.fixture(autouse=True)
def no_state_stays():
    """Forget the state that a Trainer's accelerator leaves to the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def network():
    config = transformers.BertConfig(
        vocab_size=15, max_position_embeddings=32, num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **SMALL,
    )  # fmt: skip
    return scaled(transformers.BertForSequenceClassification(config))


def examples(n=32, seed=0):
    ids = np.random.default_rng(seed).integers(5, 15, (n, 8))
    return [
        {"input_ids": torch.tensor(row), "attention_mask": torch.ones(8, dtype=torch.long), "labels": int(row[0] > 9)}
        for row in ids
    ]


def batches():
    collate = transformers.default_data_collator
    return [collate(examples(16, seed)) for seed in (1, 2)]


def trainer(folder, model=None, callbacks=(), **more):
    how = {"max_steps": 6, "save_strategy": "no", "learning_rate": 1e-3, "weight_decay": 0.1, **more}
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, **how
    )
    return transformers.Trainer(model or network(), args, train_dataset=examples(), callbacks=list(callbacks))


class Recorder(transformers.TrainerCallback):
    """Keeps the learning rate and the loss's parameters at every step."""

    def __init__(self):
        self.rates, self.sizes = [], []

    def on_step_end(self, args, state, control, **held):
        self.rates.append(held["lr_scheduler"].get_last_lr()[0])
        self.sizes.append(sum(p.numel() for p in held["model"].parameters()))


def grouped(optimiser):
    return [{id(p) for p in group["params"]} for group in optimiser.param_groups]


def test_a_network_is_pruned_in_the_middle_and_goes_on_learning(tmp_path):
    prune, seen = PruneCallback(PASSES, batches(), at_step=3, limits={"params": 0.95}, **HOW), Recorder()
    run = trainer(tmp_path, callbacks=[prune, seen])
    model = run.model
    run.train()
    assert run.model is model
    assert seen.sizes[:2] == [seen.sizes[0]] * 2
    assert seen.sizes[2] == seen.sizes[-1] < 0.95 * seen.sizes[0]

    plain = Recorder()
    trainer(tmp_path / "plain", callbacks=[plain]).train()
    assert seen.rates == plain.rates, "the schedule goes on"

    optimiser = getattr(run.optimizer, "optimizer", run.optimizer)
    decayed = set(run.get_decay_parameter_names(model))
    expected = [
        {id(p) for name, p in model.named_parameters() if (name in decayed) == decay} for decay in (True, False)
    ]
    assert grouped(optimiser) == expected
    for parameter, state in optimiser.state.items():
        assert state["exp_avg"].shape == parameter.shape
    steps = {int(state["step"]) for state in optimiser.state.values()}
    assert steps == {3, 6}, "moments of what changed start anew, the others go on"


def test_every_parameter_is_trained_after_the_pruning(tmp_path):
    prune, before = PruneCallback(PASSES, batches(), at_step=2, **HOW), {}

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **held):
            if state.global_step == 2:
                before.update({name: value.detach().clone() for name, value in held["model"].named_parameters()})

    run = trainer(tmp_path, callbacks=[prune, Keep()])
    run.train()
    after = dict(run.model.named_parameters())
    assert after.keys() == before.keys()
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert all("token_type" in name or "position" in name for name in still), still


def test_it_equals_a_training_of_the_pruned_network(tmp_path):
    """Plain SGD has no moments: pruning at step 3 is then training the pruned network for the steps that are left."""
    prune = PruneCallback(PASSES, batches(), at_step=3, **HOW)
    how = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
    run = trainer(tmp_path / "a", callbacks=[prune], **how)
    run.train()

    plain, seen = trainer(tmp_path / "plain", **how), []
    step = plain.training_step
    plain.training_step = lambda model, inputs, *rest: (seen.append(inputs), step(model, inputs, *rest))[1]
    plain.train()
    assert len(seen) == 6

    reference = network()
    for number, inputs in enumerate(seen):
        reference.train()
        loss = reference(**inputs).loss
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        if number == 2:
            calibration = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches()]
            reference = secateurs.prune(reference, calibration[0], calibration, PASSES, **HOW).model
    for (name, ours), theirs in zip(run.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_checkpoints_carry_the_plan_and_resume(tmp_path):
    prune = PruneCallback(PASSES, batches(), at_step=2, **HOW)
    run = trainer(tmp_path, callbacks=[prune], save_strategy="steps", save_steps=3)
    run.train()
    folder = tmp_path / "checkpoint-3"
    assert {"plan.json", "report.json", "unpruned_config.json"} <= {path.name for path in folder.iterdir()}
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises((OSError, ValueError)):
            transformers.BertForSequenceClassification.from_pretrained(folder, **options)

    again = trainer(tmp_path, save_strategy="steps", save_steps=3)
    prepare_resume(again, folder)
    again.train(resume_from_checkpoint=str(folder))
    for (name, ours), theirs in zip(again.model.named_parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_a_resumed_training_writes_what_an_undisturbed_one_does(tmp_path):
    def run(folder):
        prune = PruneCallback(PASSES, batches(), at_step=2, limits={"params": 0.1}, **HOW)
        return trainer(folder, callbacks=[prune], save_strategy="steps", save_steps=3)

    run(tmp_path / "a").train()
    again, start = run(tmp_path / "b"), tmp_path / "a" / "checkpoint-3"
    prepare_resume(again, start)
    again.train(resume_from_checkpoint=str(start))
    for name in ("checkpoint-6", "secateurs"):
        expected, found = tmp_path / "a" / name, tmp_path / "b" / name
        assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
        for file in ("plan.json", "report.json", "config.json"):
            assert (found / file).read_text() == (expected / file).read_text(), (name, file)
    assert json.loads((tmp_path / "b" / "secateurs" / "report.json").read_text())["verdict"] == "fail"


def test_the_end_of_training_saves_the_network_and_judges_the_limits(tmp_path):
    prune = PruneCallback(PASSES[:1], batches(), at_epoch=1, limits={"params": 0.1}, **HOW)
    run = trainer(tmp_path, callbacks=[prune])
    run.train()
    report = json.loads((tmp_path / "secateurs" / "report.json").read_text())
    assert report["verdict"] == "fail"
    assert any("above the limit 0.1" in reason for reason in report["reasons"])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "secateurs" / "huggingface")
    assert plain.config.num_hidden_layers == 3
    inputs = {"input_ids": examples(4, 9)[0]["input_ids"][None]}
    run.model.eval()
    with torch.no_grad():
        assert torch.equal(plain.eval()(**inputs).logits, run.model(**inputs).logits)


def test_before_the_training(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    model = run.model
    result = prune_trainer(run, batches(), PASSES, **HOW)
    assert result.model is run.model is model
    assert sum(isinstance(edit, DropBlock) for edit in result.plan.edits) == 1
    run.train()


def test_mistakes(tmp_path):
    with pytest.raises(RecipeError, match="give `at_step` or `at_epoch`"):
        PruneCallback(PASSES, batches())
    with pytest.raises(RecipeError, match="known are params and macs"):
        PruneCallback(PASSES, batches(), at_step=1, limits={"latency": 0.5})
    with pytest.raises(RecipeError, match="has no batches"):
        prune_in_place(network(), [], PASSES)
    prune = PruneCallback(PASSES, batches(), at_step=1, **HOW)
    with pytest.raises(ModelError, match="`torch_compile` wraps its network"):
        trainer(tmp_path, callbacks=[prune], torch_compile=True)
    model = network()
    with pytest.raises(ModelError, match="parameters that the network does not have"):
        prune_in_place(model, batches(), PASSES, optimiser=torch.optim.SGD(network().parameters(), 0.1), **HOW)
