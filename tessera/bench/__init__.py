"""Fair comparison of attention backends, from one kernel to a served request; only the command line imports this."""
