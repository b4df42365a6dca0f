"""Terms of the sum that one iteration minimises, one file each."""

from .feature_distance import FeatureDistance
from .segmentation import Segmentation

__all__ = ['FeatureDistance', 'Segmentation']
