"""`tessera bench quality`: what a backend does to the answers."""
