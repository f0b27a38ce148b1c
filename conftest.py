"""Makes `pytest suites/...` work from a clone that is not installed."""

pytest_plugins = ("harness.plugin",)
