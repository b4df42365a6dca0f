"""Contrastive, unsupervised domain adaptation for MMSegmentation 1.x."""

__version__ = '0.1.0'

from .environment import allow_checkpoint_classes, check_environment

check_environment()
allow_checkpoint_classes()

# Importing the rooms registers their classes with mmseg's registries.
from . import (  # noqa: E402
    adaptation,
    contrast,
    datasets,
    engine,
    evaluation,
    models,
)

__all__ = [
    '__version__', 'adaptation', 'contrast', 'datasets', 'engine',
    'evaluation', 'models'
]
