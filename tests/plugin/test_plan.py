"""Plans: JSON and back, composition, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from secateurs.errors import PlanError
from secateurs.plan import AddBias, DropBlock, Plan, RemoveUnits, SetAttribute, Slice

names = st.text(max_size=12)
indices = st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True).map(lambda values: tuple(sorted(values)))
slices = st.builds(Slice, module=names, parameter=names, dim=st.integers(0, 5), removed=indices)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    names,
    st.lists(st.integers(-(2**40), 2**40), max_size=4).map(tuple),
)
edits = st.one_of(
    st.builds(DropBlock, path=names, reason=names),
    st.builds(
        RemoveUnits, root=names, units=indices, reason=names, slices=st.lists(slices, min_size=1, max_size=3).map(tuple)
    ),
    st.builds(SetAttribute, module=names, name=names, value=values, reason=names),
    st.builds(AddBias, module=names, reason=names),
)
plans = st.lists(edits, max_size=5).map(lambda found: Plan(edits=tuple(found)))


def cut(*removed, module="a", parameter="weight", dim=0):
    piece = Slice(module=module, parameter=parameter, dim=dim, removed=removed)
    return RemoveUnits(root=module, units=removed, slices=(piece,))


@given(plans)
def test_json_and_back(plan):
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert Plan.from_json(text.encode()) == plan
    assert again.to_json() == text
    for before, after in zip(plan.of(SetAttribute), again.of(SetAttribute), strict=True):
        assert type(after.value) is type(before.value), "True is not 1, and 1 is not 1.0"
    raw = json.loads(text)
    assert raw["schema_version"] == 1
    assert len(raw["edits"]) == len(plan)
    assert text.count("\n") == (len(plan) + 2 if plan else 1), "one edit per line"


@given(plans, plans)
def test_plans_are_joined_in_order(first, second):
    assert (first + second).edits == first.edits + second.edits
    assert Plan.join([first, second, Plan()]) == first + second
    assert bool(first) == (len(first) > 0)


@given(st.data())
def test_kept_follows_repeated_removals_like_numpy(data):
    size = data.draw(st.integers(1, 30))
    expected = np.arange(size)
    plan = Plan()
    for _ in range(data.draw(st.integers(0, 4))):
        if len(expected) < 2:
            break
        removed = data.draw(st.sets(st.integers(0, len(expected) - 1), min_size=1, max_size=len(expected) - 1))
        expected = np.delete(expected, sorted(removed))
        noise = cut(0, module="other"), cut(0, parameter="bias"), cut(0, dim=1)
        plan += Plan(edits=(*noise, cut(*sorted(removed))))
    assert plan.kept("a", "weight", 0, size) == expected.tolist()


def test_of_yields_the_kinds_asked_for():
    plan = Plan(edits=(DropBlock(path="a"), cut(0), AddBias(module="b"), DropBlock(path="c")))
    assert [edit.path for edit in plan.of(DropBlock)] == ["a", "c"]
    assert [edit.edit for edit in plan.of(RemoveUnits, AddBias)] == ["remove_units", "add_bias"]


def test_plans_and_edits_are_immutable():
    plan = Plan(edits=(DropBlock(path="a"),))
    with pytest.raises(ValidationError, match="frozen"):
        plan.edits = ()
    with pytest.raises(ValidationError, match="frozen"):
        plan.edits[0].path = "b"


def test_a_plan_is_saved_and_loaded(tmp_path):
    plan = Plan(edits=(cut(1, 2), DropBlock(path="b", reason="CKA 0.99 ≥ 0.98")))
    plan.save(tmp_path / "new" / "plan.json")
    assert Plan.load(tmp_path / "new" / "plan.json") == plan
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"], "no temporary file is left"


SLICE = '{"module": "a", "parameter": "weight", "dim": 0, "removed": [0]}'
MALFORMED = {
    "not json": "drop everything",
    "empty": "",
    "not utf-8": b"\xff\xfe\x00",
    "a list": "[]",
    "another version": '{"schema_version": 2, "edits": []}',
    "unknown key": '{"schema_version": 1, "edits": [], "code": "import os"}',
    "unknown edit": '{"schema_version": 1, "edits": [{"edit": "run", "path": "a"}]}',
    "no kind": '{"schema_version": 1, "edits": [{"path": "a"}]}',
    "missing path": '{"schema_version": 1, "edits": [{"edit": "drop_block"}]}',
    "extra field": '{"schema_version": 1, "edits": [{"edit": "drop_block", "path": "a", "hook": "x"}]}',
    "negative index": f'{{"edits": [{{"edit": "remove_units", "root": "a", "units": [-1], "slices": [{SLICE}]}}]}}',
    "no slices": '{"edits": [{"edit": "remove_units", "root": "a", "units": [0], "slices": []}]}',
    "negative dimension": f'{{"edits": [{{"edit": "remove_units", "root": "a", "units": [0], "slices": [{SLICE}]}}]}}'.replace(
        '"dim": 0', '"dim": -1'
    ),
    "structured value": '{"edits": [{"edit": "set_attribute", "module": "a", "name": "b", "value": {"c": 1}}]}',
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_malformed_plans_are_refused(text):
    with pytest.raises(PlanError, match="not a plan of schema version 1"):
        Plan.from_json(text)


def test_a_refusal_says_where():
    with pytest.raises(PlanError, match=r"edits\.1\.drop_block\.path"):
        Plan.from_json('{"edits": [{"edit": "drop_block", "path": "a"}, {"edit": "drop_block", "path": 3}]}')


def test_a_missing_file_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")


def test_an_oversized_plan_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    Plan(edits=(DropBlock(path="a"),)).save(path)
    monkeypatch.setattr("secateurs.plan.MAX_PLAN_BYTES", 10)
    with pytest.raises(PlanError, match="at most 10 are read"):
        Plan.load(path)
    with pytest.raises(PlanError, match="at most 10 are read"):
        Plan.from_json(path.read_bytes())


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, (1, 2**70)])
def test_integers_beyond_64_bits_are_refused(value):
    with pytest.raises(ValueError, match="more than 64 bits"):
        SetAttribute(module="", name="heads", value=value)
