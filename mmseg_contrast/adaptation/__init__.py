"""One iteration of adaptation: views, teachers, objectives, and their sum."""

from .objectives import (
    Contrast,
    FeatureDistance,
    PrototypeConsistency,
    ResolutionContrast,
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
from .views import (
    BalancedCrop,
    BlockMask,
    ClassMix,
    Halves,
    PseudoLabelled,
    StrongAugment,
    UnsureDetail,
)

__all__ = [
    'RESERVED_ROOTS', 'BalancedCrop', 'BlockMask', 'ClassMix',
    'ClassThresholds', 'ConfidentFraction', 'ConfidentPixels', 'Contrast',
    'EMATeacher', 'FeatureDistance', 'Halves', 'PrototypeConsistency',
    'PrototypeRectified', 'PrototypeState', 'PseudoLabelled', 'PseudoLabels',
    'ResolutionContrast', 'Segmentation', 'Step', 'StoredPseudoLabels',
    'StrongAugment', 'SymmetricCrossEntropy', 'UDASegmentor', 'UnsureDetail',
    'View'
]
