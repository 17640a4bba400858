"""Checkpoints that somebody else has compressed: their weights, to be taken over bit by bit."""
