"""Policies that say which label a target pixel gets, and how it counts."""

from .class_thresholds import ClassThresholds
from .confident_fraction import ConfidentFraction
from .confident_pixels import ConfidentPixels
from .labels import PseudoLabels
from .prototype_rectified import PrototypeRectified
from .stored import StoredPseudoLabels

__all__ = [
    'ClassThresholds', 'ConfidentFraction', 'ConfidentPixels',
    'PrototypeRectified', 'PseudoLabels', 'StoredPseudoLabels'
]
