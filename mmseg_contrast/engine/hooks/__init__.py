"""Hooks."""

from .compile import CompileHook
from .contrast_health import ContrastHealthHook
from .feature_space import FeatureSpaceHook
from .memory_advice import MemoryAdviceHook
from .nan_guard import NaNGuardHook
from .norm_sync import NormSyncHook
from .position import PositionHook
from .prototype_init import PrototypeInitHook
from .pseudo_label_health import PseudoLabelHealthHook
from .runtime_info import DeferredRuntimeInfoHook
from .safe_checkpoint import SafeCheckpointHook
from .stop_signal import StopSignalHook
from .uda_visualization import UDAVisualizationHook

__all__ = [
    'CompileHook', 'ContrastHealthHook', 'DeferredRuntimeInfoHook',
    'FeatureSpaceHook', 'MemoryAdviceHook', 'NaNGuardHook', 'NormSyncHook',
    'PositionHook', 'PrototypeInitHook', 'PseudoLabelHealthHook',
    'SafeCheckpointHook', 'StopSignalHook', 'UDAVisualizationHook'
]
