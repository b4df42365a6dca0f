"""Modules that make one view from others."""

from .balanced_crop import BalancedCrop
from .class_mix import ClassMix
from .pseudo_labelled import PseudoLabelled
from .strong_augment import StrongAugment

__all__ = ['BalancedCrop', 'ClassMix', 'PseudoLabelled', 'StrongAugment']
