"""Damaged, mismatched, stale and interrupted inputs, and what becomes of each."""
