"""Hooks and the optimizer constructor."""

from . import hooks
from .optimizer import UDAOptimWrapperConstructor

__all__ = ['UDAOptimWrapperConstructor', 'hooks']
