"""Calibration data: from text to batches, and what the blocks are called with."""

from ..texts import read_text
from .sample import sample_from
from .text import windows

__all__ = ["read_text", "sample_from", "windows"]
