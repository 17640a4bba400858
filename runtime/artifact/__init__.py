"""The folder on disk: manifest, atomic change, metadata."""
