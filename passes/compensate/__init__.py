"""Passes that give compressed linears low-rank factors of their error."""
