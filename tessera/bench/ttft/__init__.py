"""`tessera bench ttft`: what the time to the first token is made of."""
