"""One module per subcommand of `arcface`; each defines `command`, and imports heavy packages only inside functions."""
