"""One iteration of adaptation: views, teachers, objectives, and their sum."""

from .objectives import FeatureDistance, Segmentation
from .pseudo_labels import ConfidentFraction, PseudoLabels
from .segmentor import UDASegmentor
from .state_dict import RESERVED_ROOTS
from .step import Step
from .teachers import EMATeacher
from .view import View
from .views import ClassMix, StrongAugment

__all__ = [
    'RESERVED_ROOTS', 'ClassMix', 'ConfidentFraction', 'EMATeacher',
    'FeatureDistance', 'PseudoLabels', 'Segmentation', 'Step',
    'StrongAugment', 'UDASegmentor', 'View'
]
