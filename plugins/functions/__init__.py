"""The ops as model-local functions of standard ops."""
