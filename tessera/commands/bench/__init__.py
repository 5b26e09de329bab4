"""The benchmarks as subcommands of `tessera bench`, one module each."""
