"""The check of a loaded graph against the eager model, before anything is compressed."""
