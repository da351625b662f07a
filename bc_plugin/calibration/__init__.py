"""Calibration data: from text to batches, and what the blocks are called with."""

from .batches import read_text, sample_from, windows

__all__ = ["read_text", "sample_from", "windows"]
