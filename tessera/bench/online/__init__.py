"""`tessera bench online`: a trace of requests replayed in an open loop, or by so many streams at a time."""
