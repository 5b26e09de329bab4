"""`tessera bench compare`: every benchmark for every backend, and a report."""
