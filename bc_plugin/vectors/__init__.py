"""Compensation vectors: what they are, where they are kept, how they are put in place."""

from .compensation import Compensation
from .contents import SiteErrors

__all__ = ["Compensation", "SiteErrors"]
