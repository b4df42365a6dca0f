"""Pure tensor functions. Import torch and mmengine.dist, nothing else."""

from .class_mix import choose_classes, class_mask, mix, present_classes
from .color import color_jitter, gaussian_blur, reference_blur_radius
from .ema import annealed_alpha, ema_update
from .pseudo_label import confident_fraction, hard_labels, without_classes
from .random import forked_rng, generator_at, position_seed

__all__ = [
    'annealed_alpha', 'choose_classes', 'class_mask', 'color_jitter',
    'confident_fraction', 'ema_update', 'forked_rng', 'gaussian_blur',
    'generator_at', 'hard_labels', 'mix', 'position_seed', 'present_classes',
    'reference_blur_radius', 'without_classes'
]
