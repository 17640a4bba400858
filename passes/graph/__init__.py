"""The view of the graph that passes work on: linears, embedding tables, the spec of each stage."""
