"""An attention backend for tessera, as a package of its own."""
