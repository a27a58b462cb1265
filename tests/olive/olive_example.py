"""Where the example lies, and settings and data with which pruning takes seconds."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"target_macs": 0.6, "allocation": "uniform", "refit": "none", "criteria": ["magnitude"]}
CALIBRATION = {"source": "digits", "split": "train", "samples": 128}
