"""Calibration and held-out text: its sources, and windows of tokens."""
