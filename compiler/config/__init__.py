"""model.yaml: its sections, how it is read, and what contradicts itself."""
