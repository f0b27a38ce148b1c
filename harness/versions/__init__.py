"""Releases of the libraries: what their entry points promise, what changed between two of them, and since when."""
