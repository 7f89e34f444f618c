"""The `scaledown` command: one module a subcommand, over the client. Needs no torch until something runs here."""
