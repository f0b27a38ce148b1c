"""Where a plan is judged other than by this machine's pytest: on the devices of a Ray cluster."""
