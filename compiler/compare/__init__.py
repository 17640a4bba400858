"""Compare methods at equal bytes on one model."""
