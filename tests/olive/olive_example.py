"""Where the example lies, and settings of pruning that take a second."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"target_macs": 0.6, "allocation": "uniform", "refit": "none", "criteria": ["magnitude"]}
