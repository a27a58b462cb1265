"""The search for the smallest network: what it finds, what it remembers, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from networks import images, residual

import secateurs
from secateurs.aims import find_aims
from secateurs.archive import leader
from secateurs.budget import Budget
from secateurs.data import Dataset, Roles
from secateurs.errors import DataError, ExportError, RecipeError, SecateursError
from secateurs.intervals import paired_difference_interval
from secateurs.judging import Judge, Validation
from secateurs.manager import create_manager
from secateurs.passes.baselines import Magnitude
from secateurs.passes.block_baselines import BlockInfluence, LossGreedy
from secateurs.passes.cka_cluster import CkaCluster
from secateurs.passes.mi_nodes import MiNodes
from secateurs.pipeline import Session
from secateurs.plan import DropBlock, Plan, RemoveUnits
from secateurs.report import Trial
from secateurs.search import prepare_search
from secateurs.settings import SearchSettings
from secateurs.surgery import applied

MANAGER = create_manager(external=False)


class Accuracy:
    name = "accuracy"
    higher_is_better = True
    calls = 0

    def per_example(self, outputs, labels):
        return outputs.argmax(1) == labels

    def value(self, outputs, labels):
        type(self).calls += 1
        return float((outputs.argmax(1) == labels).mean())


class Error(Accuracy):
    """Lower is better, and it is no mean over examples."""

    name = "error"
    higher_is_better = False

    def per_example(self, outputs, labels):
        return None

    def value(self, outputs, labels):
        return 1.0 - super().value(outputs, labels)


@pytest.fixture(scope="module")
def model():
    """A network that predicts every class about as often as the others."""
    network = residual()
    with torch.no_grad():
        network.head.bias -= network(torch.from_numpy(images(128, seed=2).inputs["input"])).mean(0)
    return network


@pytest.fixture(scope="module")
def roles(model):
    """Data that the network gets right: its own predictions are the labels."""
    calibration, validation = images(64, seed=1), images(128, seed=2)
    with torch.no_grad():
        labels = model(torch.from_numpy(validation.inputs["input"])).argmax(1).numpy()
    assert np.bincount(labels).min() > 10
    return Roles(calibration, validation=Dataset(validation.inputs, labels))


@pytest.fixture(scope="module")
def session(model, roles):
    def make(metric=Accuracy, progress=lambda _: None):
        return Session(
            baseline=model,
            roles=roles,
            cost_models=lambda name: MANAGER.registries.cost_models[name].load(),
            evaluate=Validation(metric(), roles.validation),
            progress=progress,
        )

    return make


@pytest.fixture(scope="module")
def find(session):
    """Return a function that searches, in depth and width unless `passes` says otherwise."""

    def run(
        passes=None,
        *,
        drop=0.15,
        confidence=None,
        folder=None,
        metric=Accuracy,
        progress=lambda _: None,
        latency=None,
        **settings,
    ):
        passes = passes or [BlockInfluence(), Magnitude(refit="dense")]
        budget = Budget(accuracy_drop=drop, accuracy_confidence=confidence)
        how = SearchSettings(**{"resolution": 0.1, **settings})
        return prepare_search(session(metric, progress), passes, MANAGER, budget, how, latency).run(folder)

    return run


@pytest.fixture(scope="module")
def whole(find, tmp_path_factory):
    """Return a whole search, its folder, and how often the metric was taken."""
    folder = tmp_path_factory.mktemp("search")
    Accuracy.calls = 0
    return find(folder=folder / "trials"), folder, Accuracy.calls


def width(**options):
    """Return a quick pass that leaves its target open."""
    return Magnitude(refit="dense", refit_scope="consumers", **options)


def figures(trials):
    return [trial.model_dump(exclude={"seconds", "plan"}) for trial in trials]


# --- what is found -------------------------------------------------------------------------------------------------------------------


def test_the_network_found_keeps_the_drop_and_no_accepted_trial_is_smaller(whole, roles):
    found = whole[0]
    trials = found.trials()
    [chosen] = [trial for trial in trials if trial.chosen]
    assert chosen.accepted
    assert chosen.cost_ratio == min(trial.cost_ratio for trial in trials if trial.accepted)
    assert 3 <= len(trials) <= 24
    assert [trial.number for trial in trials] == list(range(1, len(trials) + 1))
    inputs, labels = torch.from_numpy(roles.validation.inputs["input"]), roles.validation.labels
    with torch.no_grad():
        right = found.outcome.model(inputs).argmax(1).numpy() == labels
    assert chosen.validation == pytest.approx(right.mean())
    assert chosen.drop == pytest.approx(1 - right.mean())
    assert 0 < chosen.drop <= 0.15
    assert (chosen.lost, chosen.gained, chosen.n) == ((~right).sum(), 0, 128)
    assert chosen.drop_ci95 == paired_difference_interval(chosen.lost, 0, 128)
    assert found.outcome.shortfalls == ()


def test_depth_and_width_are_both_tried(whole):
    trials = whole[0].trials()
    assert {trial.blocks for trial in trials} >= {0, 1, 2}
    assert any(trial.target is None for trial in trials)
    assert any(trial.target is not None and trial.blocks for trial in trials)
    assert all(trial.cost_ratio <= trial.target for trial in trials if trial.target is not None)
    assert all(trial.cost_ratio == trial.macs_ratio for trial in trials)


def test_the_figures_are_those_of_the_plans(whole, model):
    found, folder, _ = whole
    for trial in found.trials(folder / "plans"):
        assert trial.plan == f"plans/trial-{trial.number:02}.json"
        plan = Plan.load(folder / trial.plan)
        before, after = (sum(p.numel() for p in network.parameters()) for network in (model, applied(model, plan)))
        assert trial.params_ratio == pytest.approx(after / before)
        assert trial.edits == len(list(plan.of(DropBlock, RemoveUnits)))
        assert len(list(plan.of(DropBlock))) == trial.blocks or "blocks could go" in trial.reasons[-1]
    assert len(list((folder / "plans").iterdir())) == len(found.trials())


def test_the_cost_that_is_asked_for_is_made_small(find):
    trials = find([width()], drop=0.3, cost="parameters", trials=3).trials()
    assert all(trial.cost_ratio == trial.params_ratio for trial in trials)
    assert any(trial.params_ratio != trial.macs_ratio for trial in trials)


def test_every_trial_says_what_latency_is_predicted(find, model):
    asked = []

    def latency(network, example):
        asked.append(network)
        return {"": 2.0 + sum(p.numel() for p in network.parameters())}

    found = find([width()], drop=0.3, trials=3, latency=latency)
    size = sum(p.numel() for p in model.parameters())
    for trial in found.trials():
        assert trial.latency_ratio == pytest.approx((2 + trial.params_ratio * size) / (2 + size))
    assert [network is model for network in asked] == [True, False, False, False], "the dense network is asked of once"


def test_a_latency_that_cannot_be_predicted_does_not_end_the_search(find):
    asked = []

    def latency(network, example):
        asked.append(network)
        raise ExportError("there is a loop in it")

    trials = find([width()], drop=0.3, trials=3, latency=latency).trials()
    assert [trial.latency_ratio for trial in trials] == [None] * 3
    assert len(asked) == 1


def test_confidence_finds_nothing_smaller(find):
    ratios = []
    for confidence in (None, 0.999):
        trials = find([width()], drop=0.3, confidence=confidence, trials=4).trials()
        ratios.append(min(trial.cost_ratio for trial in trials if trial.accepted))
    assert ratios == sorted(ratios)


def test_confidence_decides_by_the_upper_end_of_the_exact_interval(model, roles):
    """On labels that the baseline gets wrong in part, so that examples are gained as well as lost."""
    labels = roles.validation.labels.copy()
    labels[::3] = 0
    validation = Validation(Accuracy(), Dataset(roles.validation.inputs, labels))
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.head.bias[0] += 0.01
        pruned.head.bias[1] -= 0.01
    point = Judge(Budget(accuracy_drop=0.5), validation, model)(pruned)
    assert point.pairs.lost > 0 < point.pairs.gained
    low, high = paired_difference_interval(point.pairs.lost, point.pairs.gained, 128, 0.99)
    assert low < point.drop.value < high
    assert point.reason is None
    for limit, accepted in ((high + 1e-6, True), (high - 1e-6, False)):
        judged = Judge(Budget(accuracy_drop=limit, accuracy_confidence=0.99), validation, model)(pruned)
        assert (judged.reason is None) == accepted
        assert judged.drop.ci95 == paired_difference_interval(point.pairs.lost, point.pairs.gained, 128)


def test_a_drop_that_nothing_keeps_leaves_the_closest(find):
    found = find([Magnitude()], drop=0.0, trials=2)
    trials = found.trials()
    assert not any(trial.accepted for trial in trials)
    [chosen] = [trial for trial in trials if trial.chosen]
    assert chosen.drop == min(trial.drop for trial in trials)
    assert found.outcome.plan.removes
    [reason] = found.outcome.shortfalls
    assert "no network that keeps `budget.accuracy_drop` 0 " in reason
    assert f"trial {chosen.number}, loses {chosen.drop:.4f}" in reason
    assert all(reason.startswith("the drop") for trial in trials for reason in trial.reasons[:1])


def test_the_same_search_twice_is_the_same(find, whole):
    again = find()
    assert figures(again.trials()) == figures(whole[0].trials())
    assert again.outcome.plan == whole[0].outcome.plan


def test_it_stops_at_the_number_of_trials(find):
    assert len(find(trials=2).trials()) == 2


def test_a_metric_of_its_own_direction(find):
    """The error rate is lower for a better network; it has no pairs."""
    same, trials = (find([width()], drop=0.3, metric=metric, trials=3).trials() for metric in (Accuracy, Error))
    assert [trial.drop for trial in trials] == pytest.approx([trial.drop for trial in same])
    assert [trial.validation for trial in trials] == pytest.approx([1 - trial.validation for trial in same])
    assert {(trial.n, trial.drop_ci95) for trial in trials} == {(None, None)}


def test_no_network_is_evaluated_twice(whole):
    """Once the baseline, once every trial; the blocks that a trial shares with the one before count there."""
    assert whole[2] == 1 + len(whole[0].trials())


# --- passes with targets of their own ------------------------------------------------------------------------------------------------


def test_passes_with_a_target_run_in_every_trial(find):
    found = find([BlockInfluence(refit="none"), Magnitude(target_macs=0.8)], drop=0.9, trials=2)
    trials = found.trials()
    assert trials[0].blocks == 0
    assert trials[0].macs_ratio <= 0.8
    assert {trial.target for trial in trials} == {None}
    assert [record.name for record in found.outcome.records][-1] == "magnitude"


def test_what_a_pass_promises_still_counts_and_what_is_only_tried_does_not(find):
    found = find([BlockInfluence(refit="none"), Magnitude(target_macs=0.001)], drop=0.99, trials=1)
    assert len(found.outcome.shortfalls) == 1
    assert "`target_macs` 0.001 was not reached" in found.outcome.shortfalls[0]
    assert find([Magnitude(min_units=7)], drop=0.99).outcome.shortfalls == ()


def test_the_narrowest_network_ends_the_search(find):
    trials = find([Magnitude(min_units=6)], drop=1.0, resolution=0.01).trials()
    assert len(trials) <= 4
    assert any("the target was missed" in reason for trial in trials for reason in trial.reasons)


def test_more_blocks_than_can_go_end_the_search(find):
    trials = find([BlockInfluence(refit="none")], drop=1.0).trials()
    assert [trial.blocks for trial in trials] == list(range(1, len(trials) + 1))
    *before, last = trials
    assert last.reasons == [f"only {len(before)} of {last.blocks} blocks could go"]
    assert last.cost_ratio == before[-1].cost_ratio


def test_cka_cluster_is_aimed_by_its_largest_number_of_blocks(find):
    trials = find(
        [CkaCluster(threshold=0.0, tolerance=1.0, refit="none"), Magnitude(target_macs=0.9)], drop=1.0, trials=3
    ).trials()
    assert [trial.blocks for trial in trials] == [0, 1, 2]


# --- what is remembered --------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_search_repeats_no_finished_trial(find, whole, tmp_path, after):
    def interrupt(event):
        if event.task == "search" and event.done == after:
            raise Stop

    with pytest.raises(Stop):
        find(folder=tmp_path, progress=interrupt)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/trial.json")}
    assert len(kept) == after
    again = find(folder=tmp_path)
    assert figures(again.trials()) == figures(whole[0].trials())
    assert again.outcome.plan == whole[0].outcome.plan
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_finished_search_is_read_back(find, whole):
    found, folder, _ = whole
    tasks = []
    again = find(folder=folder / "trials", progress=lambda event: tasks.append(event.task))
    assert figures(again.trials()) == figures(found.trials())
    assert set(tasks) == {"search"}
    assert again.outcome.records == found.outcome.records
    for name, tensor in found.outcome.model.state_dict().items():
        assert torch.equal(again.outcome.model.state_dict()[name], tensor), name


def test_weights_are_kept_of_the_leading_trial_alone(whole):
    found, folder, _ = whole
    [chosen] = [trial for trial in found.trials() if trial.chosen]
    assert [path.parent.name for path in folder.glob("trials/*/model.safetensors")] == [f"{chosen.number:02}"]
    assert len(list(folder.glob("trials/*/plan.json"))) == len(found.trials())


def test_the_trials_of_another_search_are_not_taken_over(find, whole):
    with pytest.raises(SecateursError, match="another search"):
        find([BlockInfluence(refit="none")], folder=whole[1] / "trials")


def trial(number, cost, drop, *, accepted=True, edits=1):
    return Trial(
        number=number,
        blocks=0,
        edits=edits,
        cost_ratio=cost,
        macs_ratio=cost,
        params_ratio=cost,
        drop=drop,
        accepted=accepted,
        seconds=0,
    )


LEADERS = {
    "the cheapest accepted": ([trial(1, 0.5, 0.0), trial(2, 0.4, 0.01), trial(3, 0.3, 0.2, accepted=False)], 2),
    "of equals the better": ([trial(1, 0.5, 0.01), trial(2, 0.5, 0.0)], 2),
    "of equals the earlier": ([trial(1, 0.5, 0.0), trial(2, 0.5, 0.0)], 1),
    "none accepted": ([trial(1, 0.2, 0.3, accepted=False), trial(2, 0.9, 0.2, accepted=False)], 2),
    "one that is not finite": ([trial(1, 0.2, None, accepted=False), trial(2, 0.9, 0.9, accepted=False)], 2),
    "one that removes nothing": ([trial(1, 0.9, 0.0, edits=0), trial(2, 0.95, 0.3, accepted=False)], 2),
    "nothing": ([trial(1, 1.0, 0.0, edits=0)], None),
}


@pytest.mark.parametrize(("trials", "number"), LEADERS.values(), ids=LEADERS)
def test_which_trial_leads(trials, number):
    best = leader(trials)
    assert (best and best.number) == number


def test_a_metric_that_is_not_finite_is_not_accepted(model):
    judged = Judge(Budget(accuracy_drop=1.0), lambda network: 0.9 if network is model else float("nan"), model)(
        torch.nn.Identity()
    )
    assert (judged.value, judged.drop, judged.reason) == (None, None, "the metric is not finite")


# --- what is refused -----------------------------------------------------------------------------------------------------------------


def aims(passes, *, drop=0.1, cost="macs", asked=False):
    return find_aims(passes, accuracy_drop=drop, cost=cost, asked=asked)


def test_what_is_searched():
    assert aims([CkaCluster(), MiNodes(target_macs=0.5)]) is None
    assert aims([CkaCluster()]) is None
    found = aims([CkaCluster(), MiNodes()])
    assert (found.depth, found.width) == (0, 1)
    found = aims([CkaCluster(max_blocks=2), MiNodes()])
    assert (found.depth, found.width) == (None, 1)
    found = aims([CkaCluster(), MiNodes(target_units=0.5)], asked=True)
    assert (found.depth, found.width) == (0, None)
    found = aims([CkaCluster(), BlockInfluence(), MiNodes(target_units=0.5)])
    assert (found.depth, found.width) == (1, None)


REFUSED = {
    "no budget": (
        {"passes": [MiNodes()], "drop": None},
        r"'mi-nodes' has no target; .*`target_macs`.*`budget.accuracy_drop`",
    ),
    "no budget for depth": (
        {"passes": [BlockInfluence()], "drop": None},
        r"'block-influence' has no target; .*`blocks`",
    ),
    "no budget, but asked": (
        {"passes": [CkaCluster()], "drop": None, "asked": True},
        r"'cka-cluster' has no target; .*`max_blocks`",
    ),
    "nothing open": ({"passes": [MiNodes(target_macs=0.5)], "asked": True}, "every pass has its target"),
    "two of width": ({"passes": [MiNodes(), Magnitude()]}, "one target of width, and 'mi-nodes' and 'magnitude'"),
    "two of depth": ({"passes": [LossGreedy(), BlockInfluence()]}, "one target of depth, and 'loss-greedy' and"),
    "no such target": (
        {"passes": [MiNodes()], "cost": "watts"},
        "'watts', for which pass 'mi-nodes' takes no target; it takes `target_macs`",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        aims(arguments.pop("passes"), **arguments)


def test_a_search_needs_a_cost_model_labels_and_for_confidence_pairs(find, session):
    with pytest.raises(RecipeError, match=r"unknown cost model 'mac'\. Did you mean 'macs'"):
        find([BlockInfluence()], cost="mac")
    with pytest.raises(RecipeError, match="leave it out to search by the point drop"):
        find(metric=Error, confidence=0.95)
    blind = Session(baseline=torch.nn.Identity(), roles=session().roles, cost_models=session().cost_models)
    with pytest.raises(DataError, match="labelled validation data"):
        prepare_search(blind, [Magnitude()], MANAGER, Budget(accuracy_drop=0.1), None)


# --- in a script ---------------------------------------------------------------------------------------------------------------------


def script(model, roles, *, width=None, **arguments):
    inputs, labels = torch.from_numpy(roles.validation.inputs["input"]), torch.from_numpy(roles.validation.labels)

    def evaluate(network):
        with torch.no_grad():
            return float((network(inputs).argmax(1) == labels).double().mean())

    result = secateurs.prune(
        model,
        inputs[:2],
        [torch.from_numpy(roles.calibration.inputs["input"])],
        [{"magnitude": {"refit": "dense", "refit_scope": "consumers", **(width or {})}}],
        manager=MANAGER,
        **{"evaluate": evaluate, "accuracy_drop": 0.3, **arguments},
    )
    return result, evaluate


def test_prune_searches_to_a_drop(model, roles, tmp_path):
    result, evaluate = script(model, roles, search={"resolution": 0.2})
    [chosen] = [trial for trial in result.report.trials if trial.chosen]
    assert result.report.verdict == "pass"
    assert evaluate(result.model) == chosen.validation >= 0.7
    assert result.report.ratios.macs == pytest.approx(chosen.macs_ratio)
    assert (chosen.n, chosen.plan) == (None, None)
    result.save(tmp_path)
    assert evaluate(secateurs.load(tmp_path, build=model)) == chosen.validation


def test_prune_refuses_what_cannot_be_searched(model, roles):
    with pytest.raises(DataError, match="evaluate="):
        script(model, roles, evaluate=None)
    with pytest.raises(RecipeError, match="has no target"):
        script(model, roles, accuracy_drop=None)
    with pytest.raises(RecipeError, match=r"search: unknown option 'trial'\. Did you mean 'trials'"):
        script(model, roles, search={"trial": 3})


def test_prune_without_a_search_has_no_trials(model, roles):
    result, _ = script(model, roles, width={"target_macs": 0.7})
    assert result.report.trials == []
