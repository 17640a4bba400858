"""Passes that store weights in few bits."""
