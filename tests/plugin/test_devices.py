"""Device profiles: what they fill in, what they leave alone, and who may bring one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import secateurs
from secateurs.budget import Budget, parse_budget
from secateurs.devices import MEMORY_SHARE, Device, fill_in
from secateurs.errors import BudgetError, RecipeError
from secateurs.manager import create_manager
from secateurs.registry import Registry
from secateurs.settings import TargetSettings

URL = "https://example.org/"
BOARD = Device(
    title="Board",
    ram_mib=1000,
    cores=4,
    threads=2,
    provider="XnnpackExecutionProvider",
    artifact_mib=30,
    sources={"ram_mib": URL, "cores": URL, "artifact_mib": URL},
)
PHONE = Device(title="Phone", artifact_mib=50, sources={"artifact_mib": URL})


@pytest.fixture(scope="module")
def known():
    registry: Registry[Device] = Registry("device")
    registry.register("board", BOARD, plugin="test")
    registry.register("phone", PHONE, plugin="test")
    return registry


def test_a_device_stands_for_limits_and_defaults(known):
    budget, [target] = fill_in(parse_budget({"device": "board", "accuracy_drop": 0.01}), [TargetSettings()], known)
    assert budget.peak_memory_mib == 1000 * MEMORY_SHARE
    assert budget.memory_share == MEMORY_SHARE
    assert budget.artifact_mib == 30
    assert (target.provider, target.threads) == ("XnnpackExecutionProvider", 2)
    # Nothing is invented: no limit on time, none on accuracy but the one that was given.
    said = {"device", "memory_share", "peak_memory_mib", "artifact_mib", "accuracy_drop"}
    assert set(budget.model_dump(exclude_none=True)) == said


def test_what_is_given_stays(known):
    given_budget = {"device": "board", "peak_memory_mib": 5, "artifact_mib": 1}
    targets = [TargetSettings(threads=1), TargetSettings(provider="CPUExecutionProvider", batch_size=4)]
    budget, (first, second) = fill_in(parse_budget(given_budget), targets, known)
    assert (budget.peak_memory_mib, budget.artifact_mib, budget.memory_share) == (5, 1, None)
    assert (first.provider, first.threads) == ("XnnpackExecutionProvider", 1)
    assert (second.provider, second.threads, second.batch_size) == ("CPUExecutionProvider", 2, 4)


@given(
    st.fixed_dictionaries(
        {"device": st.sampled_from(["board", "phone"])},
        optional={
            "peak_memory_mib": st.floats(1, 1e4),
            "artifact_mib": st.floats(1, 1e4),
            "fits_mib": st.floats(1, 1e4),
            "latency_ms": st.floats(1, 1e4),
        },
    ),
    st.fixed_dictionaries({}, optional={"threads": st.integers(1, 8), "fits": st.booleans()}),
)
def test_filling_in_twice_changes_nothing_and_never_what_was_given(known, limits, options):
    once = fill_in(parse_budget(limits), [TargetSettings(**options)], known)
    assert fill_in(*once, known) == once
    # The resolved recipe is read as data, in which everything is given.
    read = parse_budget(once[0].model_dump(exclude_none=True)), [TargetSettings(**once[1][0].model_dump())]
    assert fill_in(*read, known) == once
    assert once[0].model_dump().items() >= limits.items()
    assert once[0].latency_ms == limits.get("latency_ms")
    assert once[1][0].fits == (options.get("fits", False) or "fits_mib" in limits)


def test_a_share_of_ram_needs_ram(known):
    assert fill_in(parse_budget({"device": "board", "memory_share": 0.5}), [], known)[0].peak_memory_mib == 500
    with pytest.raises(BudgetError, match="is not published; give `peak_memory_mib`"):
        fill_in(parse_budget({"device": "phone", "memory_share": 0.5}), [], known)
    with pytest.raises(BudgetError, match="give `device` too"):
        parse_budget({"memory_share": 0.5})
    budget = fill_in(parse_budget({"device": "phone"}), [], known)[0]
    assert (budget.peak_memory_mib, budget.memory_share, budget.artifact_mib) == (None, None, 50)


def test_an_unknown_device_is_answered_with_the_nearest_and_the_list(known):
    with pytest.raises(RecipeError, match=r"unknown device 'bord'. Did you mean 'board'\? Known: 'board', 'phone'"):
        fill_in(Budget(device="bord"), [], known)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ram_mib": 10}, "sources are given for"),
        ({"sources": {"cores": URL}}, "sources are given for"),
        ({"cores": 2, "threads": 3, "sources": {"cores": URL}}, "3 threads on 2 cores"),
        ({"latency_ms": 3}, "Extra inputs"),
    ],
)
def test_a_profile_without_sources_or_with_a_latency_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        Device(title="d", **fields)


def test_a_plugin_brings_a_device():
    class Plugin:
        @secateurs.hookimpl
        def secateurs_register_devices(self, register):
            register("my-board", BOARD, summary="a board of mine")

    manager = create_manager(external=False)
    manager.adopt(Plugin(), "mine")
    assert manager.registries.devices["my-board"].load() is BOARD
    assert manager.registries.devices["my-board"].plugin == "mine"
