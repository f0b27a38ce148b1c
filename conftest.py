"""Makes `pytest suites/...` work from a clone that is not installed, and picks the Hypothesis profile."""

import os

import torch
from hypothesis import settings

pytest_plugins = ("harness.plugin",)

torch.set_num_threads(1)  # small tensors: on a shared machine a second OpenMP thread mostly waits at barriers

settings.register_profile("ci", derandomize=True, deadline=None)  # the same examples every time
settings.register_profile("nightly", deadline=None, max_examples=500)  # new examples every night
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
