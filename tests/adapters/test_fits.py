"""The fits-test: limits against tensors and weights whose size is known, and files that ship against pruned ones."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipped import heavy, wide

from secateurs.errors import DataError
from secateurs.settings import TargetSettings
from secateurs_adapters.fits import FitsFigures, find_fits, smallest

MIB = 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="the fits-test needs RLIMIT_AS and /proc")


@linux
def test_the_limit_follows_the_weights_and_the_activations(tmp_path):
    files = [
        heavy(tmp_path / "small.onnx", 10),
        heavy(tmp_path / "weights.onnx", 4 * MIB),
        wide(tmp_path / "activations.onnx", 2 * MIB),
    ]
    small, weights, activations = find_fits(files, TargetSettings(memory_repeats=1))
    assert small.fits_bytes < MIB
    # 16 MiB of weights, 16 MiB of their product with the input; onnxruntime keeps the file's bytes for a while too.
    assert 32 * MIB <= weights.fits_bytes - small.fits_bytes <= 68 * MIB
    assert 8 * MIB <= activations.fits_bytes - small.fits_bytes <= 12 * MIB


@linux
@pytest.mark.alone
def test_baseline_and_candidate_are_far_apart_beside_the_spread_of_repeats(exported):
    dense, pruned = (exported(name) for name in ("resnet20", "resnet20-pruned"))
    apart = []
    for _ in range(2):  # other work on the machine widens the spread, and never narrows it
        before, after = find_fits([dense, pruned], TargetSettings(memory_repeats=3))
        assert len(before.limits) == len(after.limits) == 3
        spread = max(before.spread_bytes, after.spread_bytes, 16 * 1024)  # no finer than the resolution
        apart.append((before.fits_bytes - after.fits_bytes) / spread)
        if apart[-1] > 10:
            break
    assert max(apart) > 10
    assert before.fits_bytes == max(before.limits)
    # Weights alone are 1.1 MB of the dense file; a limit of several times the file would tell little.
    assert dense.stat().st_size < before.fits_bytes < 6 * MIB


@linux
def test_a_file_that_does_not_run_is_refused(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(DataError, match="without a memory limit"):
        find_fits([bad], TargetSettings(memory_repeats=1))


def test_device_memory_has_no_limit(tmp_path):
    [found] = find_fits([tmp_path / "m.onnx"], TargetSettings(provider="CUDAExecutionProvider"))
    assert found.fits_bytes is None
    assert found.spread_bytes is None
    assert "device memory" in found.reason


@given(st.integers(1, 2**34), st.integers(1, 2**20), st.integers(1, 2**20))
def test_the_smallest_limit_is_found_to_the_resolution(needed, start, resolution):
    asked = []

    def fits(limit):
        asked.append(limit)
        return limit >= needed

    found = smallest(fits, start, resolution)
    assert needed <= found <= needed + max(resolution, found / 1024)
    assert len(asked) <= 80


def test_what_never_fits_ends():
    with pytest.raises(DataError, match="its runs differ"):
        smallest(lambda limit: False, 1)


def test_the_largest_repeat_counts():
    figures = FitsFigures((5, 9, 7))
    assert (figures.fits_bytes, figures.spread_bytes) == (9, 4)
