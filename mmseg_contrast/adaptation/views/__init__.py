"""Modules that make one view from others."""

from .class_mix import ClassMix
from .strong_augment import StrongAugment

__all__ = ['ClassMix', 'StrongAugment']
