"""`tessera bench kernels`: attention kernels alone, checked, proven and timed in turn."""
