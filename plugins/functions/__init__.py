"""The ops as model-local functions of standard ops, for runtimes without the native library."""
