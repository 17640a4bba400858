"""Adapters of a backbone: solve, score, add, import and export."""
