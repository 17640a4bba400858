"""Passes that replace a weight by a product of two smaller ones."""
