"""Online: load a packed checkpoint, run it, generate from it."""
