"""What is quantized: real models and data, and tiny ones."""
