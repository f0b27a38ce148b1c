"""Makes `pytest suites/...` work from a clone that is not installed, and picks the Hypothesis profile."""

import os
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

pytest_plugins = ("harness.plugin",)

torch.set_num_threads(1)  # small tensors: on a shared machine a second OpenMP thread mostly waits at barriers

# Failures of past nights are tried first; a derandomized profile keeps none.
EXAMPLES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecheck" / "examples"
settings.register_profile("ci", derandomize=True, deadline=None)  # the same examples every time
settings.register_profile(
    "nightly", deadline=None, max_examples=500, print_blob=True, database=DirectoryBasedExampleDatabase(EXAMPLES)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
