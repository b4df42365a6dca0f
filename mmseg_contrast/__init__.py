"""Contrastive, unsupervised domain adaptation for MMSegmentation 1.x."""

__version__ = '0.1.0'

from .environment import allow_checkpoint_classes, check_environment

check_environment()
allow_checkpoint_classes()

# Importing the rooms registers their classes with mmseg's registries.
from . import adaptation, datasets, engine, evaluation, models  # noqa: E402

__all__ = [
    '__version__', 'adaptation', 'datasets', 'engine', 'evaluation', 'models'
]
