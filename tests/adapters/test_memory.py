"""Memory: figures against tensors whose size is known."""

import pytest
from shipped import heavy, wide

from secateurs.settings import TargetSettings
from secateurs_adapters.memory import measure_memory, profile_memory

MIB = 2**20
QUICK = TargetSettings.model_validate({"memory_repeats": 1})


def test_a_big_activation_is_measured(tmp_path):
    files = [wide(tmp_path / "small.onnx", 1000), wide(tmp_path / "big.onnx", 8 * MIB)]
    small, big = measure_memory(files, QUICK)
    assert small.reason == ""
    # 32 MiB; the memory pattern may hold it a second time.
    difference = big.peak_memory_bytes - small.peak_memory_bytes
    assert 30 * MIB < difference < 70 * MIB
    assert big.resident_memory_bytes - small.resident_memory_bytes > 30 * MIB


def test_the_batch_counts(tmp_path):
    file = wide(tmp_path / "m.onnx", 2 * MIB)
    one, four = (measure_memory([file], QUICK.model_copy(update={"batch_size": size}))[0] for size in (1, 4))
    assert four.peak_memory_bytes - one.peak_memory_bytes > 20 * MIB


def test_weights_are_measured_and_a_tiny_file_is_near_zero_but_never_below(tmp_path):
    tiny, big = measure_memory([heavy(tmp_path / "tiny.onnx", 10), heavy(tmp_path / "big.onnx", 8 * MIB)], QUICK)
    assert 0 <= tiny.peak_memory_bytes < 4 * MIB
    assert big.peak_memory_bytes > 32 * MIB


@pytest.mark.parametrize(("batch", "chunk"), [(1, 2 * MIB), (2, 4 * MIB), (3, 8 * MIB)])
def test_the_profile_is_the_size_of_the_tensors(tmp_path, batch, chunk):
    found = profile_memory(wide(tmp_path / "m.onnx", MIB // 2), QUICK.model_copy(update={"batch_size": batch}))
    # The arena's chunks are powers of two; the output and scratch are small.
    assert chunk <= found <= chunk + 64 * 1024


def test_device_memory_is_not_claimed(tmp_path):
    settings = TargetSettings.model_validate({"provider": "CUDAExecutionProvider"})
    found = measure_memory([tmp_path / "m.onnx"], settings)
    assert found[0].peak_memory_bytes is None
    assert "device memory" in found[0].reason
