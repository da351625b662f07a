"""GGUF files, llama.cpp's own: what they can carry, compensated files, and how they are checked."""
