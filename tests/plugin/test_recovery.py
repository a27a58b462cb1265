"""Training: what improves, what is kept, and what is left alone, by the plain loop and through accelerate."""

import copy

import numpy as np
import pytest
import torch
from networks import images, plain, residual, tied
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import SecateursError
from secateurs.forward import call, predict
from secateurs.outputs import kl_divergence
from secateurs.recovery import _loss, train
from secateurs.settings import RecoverySettings

DATA = images(96, labels=True)
FAST = {"epochs": 8, "learning_rate": 1e-2, "batch_size": 16}


@pytest.fixture(params=["plain", "accelerate"])
def settings(request):
    """Return a function that makes settings for each of the two loops."""
    return lambda **options: RecoverySettings(loop=request.param, **options)


def cross_entropy(model, data=DATA):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(predict(model, data), torch.from_numpy(data.labels)))


def accuracy(model):
    return float((predict(model, DATA).argmax(1).numpy() == DATA.labels).mean())


@pytest.mark.parametrize("build", [plain, residual], ids=["plain", "residual"])
def test_training_lowers_the_loss(build, settings):
    model = build()
    before = cross_entropy(model)
    assert train(model, DATA, settings(**FAST)) is model
    assert cross_entropy(model) < 0.8 * before


def test_distillation_alone_approaches_the_teacher(settings):
    teacher, student = plain(seed=1), plain(seed=2)
    unlabelled = Dataset(DATA.inputs)
    reference = predict(teacher, unlabelled)
    before = kl_divergence(reference, predict(student, unlabelled))
    state = copy.deepcopy(teacher.state_dict())
    train(student, unlabelled, settings(**FAST), teacher=teacher)
    assert kl_divergence(reference, predict(student, unlabelled)) < 0.5 * before
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


def softmax(values):
    shifted = np.exp(values - values.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("labels", "teacher"), [(True, False), (False, True), (True, True)], ids=["labels", "teacher", "both"]
)
def test_the_loss_is_the_mean_of_cross_entropy_and_scaled_divergence(labels, teacher):
    student, dense, temperature = plain(seed=2), plain(seed=1), 3.0
    batch = Dataset(DATA.inputs, DATA.labels if labels else None)
    settings = RecoverySettings(temperature=temperature)
    found = _loss(student, dense if teacher else None, batch, settings)
    logits, target = (predict(model, batch).double().numpy() for model in (student, dense))
    terms = []
    if labels:
        terms.append(-np.log(softmax(logits)[np.arange(len(batch)), DATA.labels]).mean())
    if teacher:
        p, q = softmax(target / temperature), softmax(logits / temperature)
        terms.append(temperature**2 * (p * np.log(p / q)).sum(1).mean())
    assert float(found.detach()) == pytest.approx(np.mean(terms), rel=1e-4)


def test_token_labels_are_learnt_token_by_token(settings):
    model = tied()
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 20, size=(32, 6))
    data = Dataset({"input": inputs}, (inputs + 1) % 20)
    chosen = settings(epochs=3, learning_rate=1e-2, batch_size=8)
    loss = lambda: float(_loss(model, None, data, chosen).detach())  # noqa: E731
    before = loss()
    train(model, data, chosen)
    assert loss() < 0.9 * before
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.5, 0.7, 0.9, 0.6), 2), ((0.5, 0.4, 0.3, 0.2), 0), ((0.5, 0.5, 0.4, 0.5), 3), ((0.1, 0.2, 0.3, 0.4), 3)],
    ids=["middle", "start", "last of equals", "end"],
)
def test_the_best_weights_are_kept(scores, best, settings):
    model, states = residual(), []

    def evaluate(network):
        states.append(copy.deepcopy(network.state_dict()))
        return scores[len(states) - 1]

    train(model, DATA, settings(epochs=3, batch_size=32), evaluate=evaluate)
    assert len(states) == 4
    assert all(torch.equal(value, states[best][key]) for key, value in model.state_dict().items())
    assert not torch.equal(states[0]["stem.weight"], states[1]["stem.weight"])


def test_a_real_metric_never_falls(settings):
    model = plain()
    before = accuracy(model)
    train(model, DATA, settings(**FAST), evaluate=accuracy)
    assert accuracy(model) >= before


def test_evaluation_sees_the_network_in_evaluation_mode_without_gradients(settings):
    modes = []

    def careless(network):
        modes.append((any(module.training for module in network.modules()), torch.is_grad_enabled()))
        call(network, DATA)  # in training mode this would change BatchNorm statistics
        return 0.0

    train(residual(), DATA, settings(epochs=2, batch_size=32), evaluate=careless)
    assert modes == [(False, False)] * 3


def test_modes_come_out_as_they_went_in(settings):
    model = residual().eval()
    model.layers[1].train()
    modes = [module.training for module in model.modules()]
    train(model, DATA, settings(epochs=1, batch_size=32))
    assert [module.training for module in model.modules()] == modes


def test_frozen_parameters_are_untouched(settings):
    model = plain()
    model[0].requires_grad_(False)
    model[5].bias.requires_grad_(False)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    free = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, DATA, settings(epochs=1, weight_decay=0.1))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert not any(torch.equal(parameters[name], value) for name, value in free.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_is_seeded_and_leaves_the_random_state(settings):
    random = torch.get_rng_state()
    first, second, other = plain(), plain(), plain()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        train(model, DATA, settings(epochs=1, batch_size=16), seed=seed)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("how", ["no epochs", "all frozen"])
def test_nothing_to_train_changes_nothing(how, settings):
    model = residual()
    if how == "all frozen":
        model.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    train(model, DATA, settings(epochs=0 if how == "no epochs" else 2))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_progress_counts_every_step(settings):
    seen = []
    chosen = settings(epochs=2, batch_size=40)
    train(plain(), DATA, chosen, evaluate=lambda _: 0.5, progress=lambda *event: seen.append(event))
    steps = [event[:2] for event in seen if event[2].startswith("loss")]
    assert steps == [(number, 6) for number in range(1, 7)]
    assert [event[2] for event in seen if event[2].startswith("epoch")] == ["epoch 1: 0.5000", "epoch 2: 0.5000"]


def test_nothing_to_learn_from_is_an_error(settings):
    with pytest.raises(SecateursError, match="neither labels nor a teacher"):
        train(plain(), images(8), settings(**FAST))


def test_a_loss_that_is_not_finite_is_an_error(settings):
    model = plain()
    with torch.no_grad():
        model[7].weight[0, 0] = float("nan")
    with pytest.raises(SecateursError, match=r"lower `recovery\.learning_rate`"):
        train(model, DATA, settings(**FAST))
    assert not any(module.training for module in model.modules())
