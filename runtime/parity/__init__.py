"""Parity with eager PyTorch, checked from the record in an artifact."""
