"""Passes that add low-rank factors of their error to compressed linears."""
