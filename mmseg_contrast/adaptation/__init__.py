"""One iteration of adaptation: views, teachers, objectives, and their sum."""

from .objectives import (
    Contrast,
    FeatureDistance,
    PrototypeConsistency,
    Segmentation,
    SymmetricCrossEntropy,
)
from .prototype_state import PrototypeState
from .pseudo_labels import (
    ClassThresholds,
    ConfidentFraction,
    ConfidentPixels,
    PrototypeRectified,
    PseudoLabels,
    StoredPseudoLabels,
)
from .segmentor import UDASegmentor
from .state_dict import RESERVED_ROOTS
from .step import Step
from .teachers import EMATeacher
from .view import View
from .views import BalancedCrop, ClassMix, PseudoLabelled, StrongAugment

__all__ = [
    'RESERVED_ROOTS', 'BalancedCrop', 'ClassMix', 'ClassThresholds',
    'ConfidentFraction', 'ConfidentPixels', 'Contrast', 'EMATeacher',
    'FeatureDistance', 'PrototypeConsistency', 'PrototypeRectified',
    'PrototypeState', 'PseudoLabelled', 'PseudoLabels', 'Segmentation', 'Step',
    'StoredPseudoLabels', 'StrongAugment', 'SymmetricCrossEntropy',
    'UDASegmentor', 'View'
]
