"""Hooks."""

from .compile import CompileHook
from .contrast_health import ContrastHealthHook
from .feature_space import FeatureSpaceHook
from .norm_sync import NormSyncHook
from .position import PositionHook
from .prototype_init import PrototypeInitHook
from .pseudo_label_health import PseudoLabelHealthHook
from .runtime_info import DeferredRuntimeInfoHook
from .uda_visualization import UDAVisualizationHook

__all__ = [
    'CompileHook', 'ContrastHealthHook', 'DeferredRuntimeInfoHook',
    'FeatureSpaceHook', 'NormSyncHook', 'PositionHook', 'PrototypeInitHook',
    'PseudoLabelHealthHook', 'UDAVisualizationHook'
]
