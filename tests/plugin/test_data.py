"""Data roles: disjoint by content, stratified, seeded; and data sets that are refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.data import ROLES, Dataset, order_notes, resolve_roles, stratified_split
from secateurs.errors import DataError


def numbered(start, stop, *, labels=True, origin="", classes=3):
    """Examples that are their own number; labels cycle through the classes."""
    values = np.arange(start, stop)
    inputs = values[:, None] * np.ones((1, 2), np.float32)
    return Dataset({"x": inputs.astype(np.float32)}, values % classes if labels else None, origin)


def present(roles):
    return {role: getattr(roles, role) for role in ROLES if getattr(roles, role) is not None}


def assert_disjoint(roles):
    seen = {}
    for role, data in present(roles).items():
        for key in data.fingerprints():
            assert seen.setdefault(key, role) == role, f"{role} and {seen[key]} share an example"


# --- data sets --------------------------------------------------------------------------------------------------------


def test_batches_cover_everything_in_order():
    data = numbered(0, 10)
    sizes = [len(batch) for batch in data.batches(4)]
    assert sizes == [4, 4, 2]
    assert [len(batch) for batch in data.batches(4, drop_last=True)] == [4, 4]
    joined = np.concatenate([batch.inputs["x"] for batch in data.batches(3)])
    np.testing.assert_array_equal(joined, data.inputs["x"])
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in data.batches(3)]), data.labels)


def test_take_keeps_the_order_the_labels_and_the_rest():
    data = Dataset({"x": np.arange(5.0)[:, None]}, np.arange(5), "somewhere", keyword=True).take([3, 1])
    assert data.inputs["x"].ravel().tolist() == [3.0, 1.0]
    assert data.labels.tolist() == [3, 1]
    assert (data.origin, data.keyword) == ("somewhere", True)


def test_fingerprints_follow_the_content_of_all_inputs():
    a = np.arange(6.0).reshape(3, 2)
    first = Dataset({"a": a, "b": a[:, :1]}, np.arange(3))
    second = Dataset({"b": a[[2, 1, 0], :1], "a": a[[2, 1, 0]]}, np.zeros(3, int))
    assert first.fingerprints() == second.fingerprints()[::-1], "order of names and labels do not count"
    changed = Dataset({"a": a, "b": a[:, :1] + [[0], [1e-9], [0]]})
    same = [x == y for x, y in zip(first.fingerprints(), changed.fingerprints(), strict=True)]
    assert same == [True, False, True]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_repeated_examples_count_for_less(values):
    data = Dataset({"x": np.array(values, np.float32)[:, None], "y": np.ones((len(values), 2))}, np.arange(len(values)))
    first, counts = data.repeats
    distinct = list(dict.fromkeys(values))
    assert [values[index] for index in first] == distinct
    assert first.tolist() == [values.index(value) for value in distinct]
    assert counts.tolist() == [values.count(value) for value in distinct]
    weights = [
        values.count(value) / len(values) for value in distinct
    ]  # the mean's variance, of independent unit variances
    assert 1 / (data.effective_share * len(values)) == pytest.approx(sum(weight**2 for weight in weights))
    assert (data.effective_share == 1) == (len(distinct) == len(values))


@pytest.mark.parametrize(
    ("names", "keyword", "noted"),
    [
        (("b", "a"), False, True),
        (("a", "c"), False, True),
        (("b", "a"), True, False),
        (("a", "b"), False, False),
        (("a",), False, False),
        (("y", "x"), False, False),
    ],
)
def test_inputs_named_after_other_parameters_are_noted(names, keyword, noted):
    data = Dataset({name: np.zeros((2, 1)) for name in names}, keyword=keyword)
    notes = order_notes(lambda a, b=None, c=None: (a, b, c), data)
    assert [str(list(names)) in note and "`forward(a, b, c)`" in note for note in notes] == [True] * noted


BAD = {
    "no inputs": ({}, None, "no input arrays"),
    "uneven": ({"a": np.zeros((3, 1)), "b": np.zeros((2, 1))}, None, "different lengths"),
    "empty": ({"a": np.zeros((0, 4))}, None, "is empty"),
    "labels": ({"a": np.zeros((3, 1))}, np.zeros(2), "3 examples but 2 labels"),
    "nan": ({"a": np.array([[0.0, np.nan], [1.0, np.inf], [0, 0]])}, None, "in 2 of 3 examples"),
}


@pytest.mark.parametrize(("inputs", "labels", "message"), BAD.values(), ids=BAD)
def test_malformed_data_is_refused(inputs, labels, message):
    with pytest.raises(DataError, match=message):
        Dataset(inputs, labels, "where")


# --- splits -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_split_is_disjoint_and_stratified(data):
    counts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) * 7 - 3, counts))
    total = len(labels)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=1, max_size=4)))
    sizes = np.diff([0, *cuts]).tolist()
    parts = stratified_split(labels, sizes, total, seed=data.draw(st.integers(0, 100)))
    assert [len(part) for part in parts] == sizes
    chosen = np.concatenate(parts)
    assert len(set(chosen.tolist())) == len(chosen)
    for part in parts:
        assert part.tolist() == sorted(part.tolist())
        for value, count in zip(np.unique(labels), counts, strict=True):
            expected = len(part) * count / total
            # Both ends of a part fall within one example of each class, and their threshold within one per class.
            assert abs((labels[part] == value).sum() - expected) <= 2 * (1 + len(counts) * count / total)


def test_even_classes_are_split_evenly():
    labels = np.tile(np.arange(5), 40)
    for part in stratified_split(labels, [100, 50, 50], 200, seed=3):
        counts = np.bincount(labels[part])
        assert counts.max() - counts.min() <= 2


def test_a_split_is_seeded():
    labels = np.arange(60) % 4
    first, again, other = (stratified_split(labels, [20], 60, seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    "labels", [None, np.linspace(0, 1, 30), np.zeros((30, 2), int)], ids=["none", "regression", "per token"]
)
def test_other_labels_are_split_at_random(labels):
    (part,) = stratified_split(labels, [10], 30, seed=0)
    assert len(set(part.tolist())) == 10
    assert part.tolist() != list(range(10))


def test_a_split_cannot_ask_for_too_much():
    with pytest.raises(DataError, match="needs 12 examples, but there are 10"):
        stratified_split(None, [6, 6], 10, seed=0)


# --- roles ------------------------------------------------------------------------------------------------------------


def sizes(roles):
    return {role: len(data) for role, data in present(roles).items()}


def test_missing_roles_are_cut_from_calibration_and_never_from_evaluation():
    evaluation = numbered(1000, 1100)
    roles = resolve_roles({"calibration": numbered(0, 300), "evaluation": evaluation}, {}, 0)
    assert sizes(roles) == {"calibration": 120, "training": 120, "validation": 60, "evaluation": 100}
    assert_disjoint(roles)
    np.testing.assert_array_equal(roles.evaluation.inputs["x"], evaluation.inputs["x"])
    for data in (roles.calibration, roles.training, roles.validation):
        assert np.bincount(data.labels).min() >= len(data) // 3 - 3


def test_only_the_roles_asked_for_are_cut():
    source = {"calibration": numbered(0, 300)}
    assert sizes(resolve_roles(source, {}, 0, cut=("validation",))) == {"calibration": 240, "validation": 60}
    assert sizes(resolve_roles(source, {}, 0, cut=())) == {"calibration": 300}


def test_samples_bound_the_roles():
    samples = {"calibration": 50, "evaluation": 30}
    roles = resolve_roles({"calibration": numbered(0, 300), "evaluation": numbered(300, 400)}, samples, 0)
    assert sizes(roles) == {"calibration": 50, "training": 190, "validation": 60, "evaluation": 30}
    assert_disjoint(roles)


def test_a_small_source_is_not_cut_for_validation():
    assert "validation" not in sizes(resolve_roles({"calibration": numbered(0, 30)}, {}, 0))


def test_splits_are_seeded():
    source = {"calibration": numbered(0, 100)}
    first, again, other = (resolve_roles(source, {}, seed).calibration.fingerprints() for seed in (0, 0, 1))
    assert first == again != other


def test_given_roles_stay_as_they_are():
    given_roles = {role: numbered(100 * i, 100 * i + 50) for i, role in enumerate(ROLES)}
    roles = resolve_roles(given_roles, {}, 0)
    assert sizes(roles) == dict.fromkeys(ROLES, 50)
    assert roles.notes == ()


@pytest.mark.parametrize("given_role", ["training", "validation"])
def test_one_given_role_leaves_the_other_to_be_cut(given_role):
    roles = resolve_roles({"calibration": numbered(0, 100), given_role: numbered(100, 140)}, {}, 0)
    assert set(present(roles)) == {"calibration", "training", "validation"}
    assert len(getattr(roles, given_role)) == 40
    assert_disjoint(roles)


@given(
    total=st.integers(1, 40),
    classes=st.integers(1, 4),
    calibration=st.none() | st.integers(1, 40),
    duplicated=st.booleans(),
    seed=st.integers(0, 5),
)
def test_roles_are_always_disjoint_by_content(total, classes, calibration, duplicated, seed):
    values = np.arange(total) // (2 if duplicated else 1)
    source = Dataset({"x": values[:, None].astype(np.float32)}, values % classes)
    try:
        roles = resolve_roles({"calibration": source}, {"calibration": calibration}, seed)
    except DataError:
        assert total < 2 or duplicated or (calibration or 0) > total
        return
    assert_disjoint(roles)
    if not duplicated:
        assert sum(len(data) for data in present(roles).values()) == total
        assert roles.notes == ()


def test_duplicates_inside_the_source_never_end_up_on_two_sides():
    values = np.repeat(np.arange(60), 2)
    source = Dataset({"x": values[:, None].astype(np.float32)}, values % 3)
    roles = resolve_roles({"calibration": source}, {}, 0)
    assert_disjoint(roles)
    assert any("calibration examples are exact duplicates" in note for note in roles.notes)


def test_duplicates_leave_the_side_that_is_not_evaluation():
    pools = {
        "calibration": numbered(0, 200),
        "training": numbered(199, 400),  # one shared with calibration
        "validation": numbered(399, 600),  # one shared with training
        "evaluation": numbered(599, 800),  # one shared with validation
    }
    roles = resolve_roles(pools, {}, 0)
    assert_disjoint(roles)
    assert sizes(roles) == {"calibration": 199, "training": 200, "validation": 200, "evaluation": 201}
    assert len(roles.notes) == 3
    assert "1 of 201 validation examples are exact duplicates of evaluation examples and were dropped" in roles.notes


def test_labels_do_not_hide_a_duplicate():
    shared = np.full((1, 2), 7, np.float32)
    calibration = Dataset({"x": np.r_[numbered(100, 150).inputs["x"], shared]}, None)
    evaluation = Dataset({"x": np.r_[numbered(0, 5).inputs["x"], shared]}, np.arange(6))
    roles = resolve_roles({"calibration": calibration, "evaluation": evaluation}, {}, 0, cut=())
    assert len(roles.calibration) == 50


@pytest.mark.parametrize("shared", [3, 50])
def test_many_duplicates_are_an_overlap(shared):
    pools = {"calibration": numbered(0, 100), "evaluation": numbered(100 - shared, 200 - shared)}
    with pytest.raises(DataError, match=f"'calibration' and 'evaluation' overlap: {shared} of 100"):
        resolve_roles(pools, {}, 0)


def test_one_source_cannot_play_two_roles():
    pools = {
        "calibration": numbered(0, 10, origin="digits:train"),
        "evaluation": numbered(20, 30, origin="digits:train"),
    }
    with pytest.raises(DataError, match=r"'calibration' and 'evaluation' overlap: both read 'digits:train'"):
        resolve_roles(pools, {}, 0)


@pytest.mark.parametrize("given_roles", [{}, {"evaluation": numbered(0, 5)}], ids=["none", "evaluation only"])
def test_calibration_is_needed(given_roles):
    with pytest.raises(DataError, match="no `calibration` role"):
        resolve_roles(given_roles, {}, 0)


def test_too_few_examples_to_cut():
    with pytest.raises(DataError, match="too few to cut"):
        resolve_roles({"calibration": numbered(0, 1)}, {}, 0)


def test_more_samples_than_there_are():
    with pytest.raises(DataError, match="ask for fewer `samples`"):
        resolve_roles({"calibration": numbered(0, 10)}, {"calibration": 11}, 0)
    pools = {"calibration": numbered(0, 10), "evaluation": numbered(20, 30)}
    with pytest.raises(DataError, match="ask for fewer `samples`"):
        resolve_roles(pools, {"evaluation": 11}, 0)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("dog", "fox"), "the label 0 is 'cat' in 'calibration' and 'dog' in 'evaluation'"),
        (("cat", "dog"), "the label 2 is 'fox' in 'calibration' and nothing in 'evaluation'"),
        (("cat", "fox", "dog"), "the label 1 is 'dog' in 'calibration' and 'fox' in 'evaluation'"),
    ],
)
def test_roles_with_other_classes_are_refused(classes, said):
    calibration = replace(numbered(0, 50), classes=("cat", "dog", "fox"))
    with pytest.raises(DataError, match=r"classes: \[") as caught:
        resolve_roles({"calibration": calibration, "evaluation": replace(numbered(50, 60), classes=classes)}, {}, 0)
    assert said in str(caught.value)


@pytest.mark.parametrize("classes", [None, ("cat", "dog", "fox")])
def test_roles_with_the_same_or_unknown_classes_go_together(classes):
    calibration = replace(numbered(0, 50), classes=("cat", "dog", "fox"))
    roles = resolve_roles({"calibration": calibration, "evaluation": replace(numbered(50, 60), classes=classes)}, {}, 0)
    assert roles.training.classes == ("cat", "dog", "fox"), "what is cut keeps them"
