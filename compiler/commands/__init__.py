"""The subcommands of ``eoracc``, one module each."""
