"""What the pass and refinement need, on paper: memory, disk, operations. No weight is read."""
