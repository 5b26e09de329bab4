"""`tessera bench online`: a trace of requests replayed in an open loop."""
