"""The forward pass over calibration text in which layer passes and surveys run."""
