"""Figures of a build: fidelity, gates, and the lines and files that show them."""
