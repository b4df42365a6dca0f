"""Pure tensor functions. Import torch and mmengine.dist, nothing else."""

from .block_mask import block_grid, block_mask, hide_blocks
from .class_mix import choose_classes, class_mask, mix, present_classes
from .class_moments import (
    class_moments,
    class_variance,
    gather_moments,
    merge_moments,
    pool_moments,
)
from .color import color_jitter, gaussian_blur, reference_blur_radius
from .contrast import (
    bank_energies,
    bank_positives,
    check_choice,
    contrast_loss,
    contrast_regularizer,
    gaussian_energies,
    own_class,
    prototype_energies,
    temperature_scale,
)
from .contrast_keys import class_contrast_loss, pair_contrast_loss
from .crop_box import crop_to_box, draw_crop_box, scale_box, slide_boxes
from .ema import annealed_alpha, ema_update
from .feature_distance import masked_feature_distance
from .fusion import fuse_detail, merge_windows
from .label_downscale import downscale_labels
from .labels import known_labels
from .pair_relation import same_label, same_label_across_images
from .pseudo_label import confident_fraction, hard_labels, without_classes
from .queue import gather_new, push, top_scored
from .random import forked_rng, generator_at, position_seed

__all__ = [
    'annealed_alpha', 'bank_energies', 'bank_positives', 'block_grid',
    'block_mask', 'check_choice', 'choose_classes', 'class_contrast_loss', 'class_mask',
    'class_moments', 'class_variance', 'color_jitter', 'confident_fraction',
    'contrast_loss', 'contrast_regularizer', 'crop_to_box', 'downscale_labels',
    'draw_crop_box', 'ema_update', 'forked_rng', 'fuse_detail',
    'gather_moments', 'gather_new', 'gaussian_blur', 'gaussian_energies',
    'generator_at', 'hard_labels', 'hide_blocks', 'known_labels', 'masked_feature_distance',
    'merge_moments', 'merge_windows', 'mix', 'own_class', 'pair_contrast_loss',
    'pool_moments', 'position_seed', 'present_classes', 'prototype_energies',
    'push', 'reference_blur_radius', 'same_label', 'same_label_across_images',
    'scale_box', 'slide_boxes', 'temperature_scale', 'top_scored',
    'without_classes'
]
