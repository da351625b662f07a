"""Models that stay in their files: a block is in memory only while it is needed."""
