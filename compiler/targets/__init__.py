"""Targets: from the compressed graph to the files of an artifact."""
