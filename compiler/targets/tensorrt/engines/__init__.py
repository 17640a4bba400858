"""Build TensorRT engines ahead of time: profiles, the builder in its own process, its log.

``bindings`` says what goes in and out of a graph and which calls an engine takes; ``build`` builds
one engine, or finds it where an earlier build has left it; ``worker`` is the process that has
TensorRT loaded; ``layers`` reads in its log what it made of the graph.
"""
