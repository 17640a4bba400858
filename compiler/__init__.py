"""The compiler: model.yaml and a checkpoint in, a checked artifact out."""
