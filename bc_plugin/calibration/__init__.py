"""Calibration data: from text to batches, and what the blocks are called with."""

from .sample import sample_from
from .text import read_text, windows

__all__ = ["read_text", "sample_from", "windows"]
