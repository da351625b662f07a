"""Training of vectors: settings, data, what is minimised, and the loop."""
