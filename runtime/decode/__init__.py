"""Decoding: scheduler, sampling, scoring, adapter bank, text."""
