"""Other engines to compare with; run by path, so that each may live in an environment without tessera."""
