"""Makes `networks.py` importable by the tests beside it, and keeps them light."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the networks are tiny; more threads only wait for each other
settings.register_profile("quick", settings.default, max_examples=50)
settings.load_profile("quick")
