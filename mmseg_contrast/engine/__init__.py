"""Hooks, the optimizer constructor, the wrapper for several GPUs."""

from . import hooks
from .distributed import UDADistributedDataParallel, refuse_other_wrappers
from .optimizer import UDAOptimWrapperConstructor

__all__ = [
    'UDADistributedDataParallel', 'UDAOptimWrapperConstructor', 'hooks',
    'refuse_other_wrappers'
]
