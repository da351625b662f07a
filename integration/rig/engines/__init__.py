"""Who serves what was exported. A worker runs by itself, in its engine's own environment."""
