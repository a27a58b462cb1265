"""What the process of a model inherits."""

from __future__ import annotations

import pytest

from secateurs_adapters.zoo import launch


@pytest.mark.parametrize(("own", "threads"), [(None, "4"), ("1", "1"), ("8", "4"), ("0", "4"), ("many", "4")])
def test_who_asks_for_fewer_threads_gets_fewer(monkeypatch, own, threads):
    if own is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert launch._environment(4)["OMP_NUM_THREADS"] == threads
