"""Measurements of hwnas itself: `python -m benchmarks --list`."""
