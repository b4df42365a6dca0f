"""Terms of the sum that one iteration minimises, one file each."""

from .contrast import Contrast
from .feature_distance import FeatureDistance
from .prototype_consistency import PrototypeConsistency
from .resolution_contrast import ResolutionContrast
from .segmentation import Segmentation
from .symmetric_cross_entropy import SymmetricCrossEntropy

__all__ = [
    'Contrast', 'FeatureDistance', 'PrototypeConsistency',
    'ResolutionContrast', 'Segmentation', 'SymmetricCrossEntropy'
]
