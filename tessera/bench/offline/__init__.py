"""`tessera bench offline`: throughput on fixed token ids, a process for each engine."""
