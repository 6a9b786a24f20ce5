"""One module a subcommand of `arcface`; each holds `command`, a click command, and imports what is heavy inside it."""
