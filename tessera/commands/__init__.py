"""What each `tessera` subcommand does; only the command line imports it."""
