"""The model in eager PyTorch: the oracle of parity, and gradients."""
