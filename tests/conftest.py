"""Settings that all tests share."""

import os

from hypothesis import settings

# In CI the same examples are tried each time, so that a change is judged and not luck; by hand, new ones are looked for.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "search")
