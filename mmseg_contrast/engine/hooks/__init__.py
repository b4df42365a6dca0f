"""Hooks."""

from .contrast_health import ContrastHealthHook
from .feature_space import FeatureSpaceHook
from .nan_guard import NaNGuardHook
from .norm_sync import NormSyncHook
from .position import PositionHook
from .prototype_init import PrototypeInitHook
from .pseudo_label_health import PseudoLabelHealthHook
from .uda_visualization import UDAVisualizationHook

__all__ = [
    'ContrastHealthHook', 'FeatureSpaceHook', 'NaNGuardHook', 'NormSyncHook',
    'PositionHook', 'PrototypeInitHook', 'PseudoLabelHealthHook',
    'UDAVisualizationHook'
]
