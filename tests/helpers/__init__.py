"""What several tests need: tiny models, and what is done with them again and again."""
