"""Adapters of an artifact: files, formats, store, weighted sums."""
