"""`tessera bench api`: a sweep over concurrency."""
