"""Many runs: what regressed, what flakes, what drifts, and what has really run. docs/history.md."""
