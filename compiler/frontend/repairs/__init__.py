"""Repairs of the graphs that mobius leaves incomplete, one module for each kind."""
