"""Watching long work: spans of time, a trace of them, a log."""
