"""Hooks."""

from .norm_sync import NormSyncHook
from .position import PositionHook
from .pseudo_label_health import PseudoLabelHealthHook
from .uda_visualization import UDAVisualizationHook

__all__ = [
    'NormSyncHook', 'PositionHook', 'PseudoLabelHealthHook',
    'UDAVisualizationHook'
]
