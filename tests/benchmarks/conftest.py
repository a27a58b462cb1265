"""The benchmarks are scripts; `test_benchmarks.py` runs them where `-m long` asks for it."""

collect_ignore = [
    "measuring.py",
    "cka_sweep.py",
    "cifar_allocation.py",
    "group_enumeration.py",
    "depth.py",
    "selection_speed.py",
]
