"""The mathematics of the passes, as pure functions on arrays; no module here knows the graph."""
