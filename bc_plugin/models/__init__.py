"""What is known of any model: its blocks, what they are called with, which tokens lead."""
