"""Lowering: from the compressed graph to what one target runs best, one module a target."""
