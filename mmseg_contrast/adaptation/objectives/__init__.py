"""Terms of the sum that one iteration minimises, one file each."""

from .segmentation import Segmentation

__all__ = ['Segmentation']
