"""The benchmarks are scripts; `test_benchmarks.py` runs them where `-m long` asks for it."""

collect_ignore = [
    "measuring.py",
    "cka_sweep.py",
    "cifar.py",
    "group_enumeration.py",
    "depth.py",
    "selection_speed.py",
    "minilm.py",
    "stories260k.py",
    "frontier.py",
    "zoo_overhead.py",
    "aa_latency.py",
    "memory_plan.py",
]
