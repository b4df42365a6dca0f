"""Modules that make one view from others."""

from .balanced_crop import BalancedCrop
from .block_mask import BlockMask
from .class_mix import ClassMix
from .halves import Halves
from .pseudo_labelled import PseudoLabelled
from .strong_augment import StrongAugment
from .unsure_detail import UnsureDetail

__all__ = [
    'BalancedCrop', 'BlockMask', 'ClassMix', 'Halves', 'PseudoLabelled',
    'StrongAugment', 'UnsureDetail'
]
