"""Pure tensor functions. Import torch and mmengine.dist, nothing else."""

from .balanced_crop import (
    balance_scores,
    box_counts,
    choose_offsets,
    crop_windows,
    draw_offsets,
)
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
    variance_energies,
)
from .contrast_keys import class_contrast_loss, pair_contrast_loss
from .crop_box import (
    BoxOfEach,
    box_size,
    crop_to_box,
    draw_crop_box,
    places_in_box,
    put_on_canvas,
    scale_box,
    slide_boxes,
    within_box,
)
from .ema import annealed_alpha, ema_update
from .feature_distance import masked_feature_distance
from .fusion import fuse_detail, merge_windows
from .grouped import blocks_of_classes
from .hard_negatives import hardest_negatives, mixed_energies
from .label_downscale import downscale_labels, labels_at
from .labels import ignored_last, known_labels
from .noisy_labels import symmetric_cross_entropy, uniform_divergence
from .pair_agreement import pair_agreement_loss
from .pair_relation import (
    except_self,
    place_weights,
    same_label,
    same_label_across_images,
    same_pair,
    same_top_features,
    teacher_topk,
    within,
)
from .pair_weights import complement_weights, joint_weights, split_weights
from .precision import full_precision
from .prototype import (
    image_class_means,
    moved_prototypes,
    prototype_consistency,
    prototype_distances,
    prototype_scores,
)
from .pseudo_label import (
    class_thresholds,
    confidence_histogram,
    confident_fraction,
    hard_labels,
    logit_probabilities,
    normalized,
    over_thresholds,
    rectified,
    without_classes,
)
from .queue import gather_new, only_finite, push, top_scored
from .random import forked_rng, generator_at, position_seed
from .resample import bilinear_at, centres
from .resolution_contrast import resolution_contrast
from .sampled_negatives import (
    queue_negatives,
    reco_loss,
    sampled_contrast_loss,
    similar_class_negatives,
    u2pl_loss,
)
from .sampling import (
    draw_per_group,
    entropy_threshold,
    hard_and_easy,
    own_probability,
    pixel_entropy,
    push_members,
    rank_in_groups,
    top_scored_members,
    unreliable_class_members,
)
from .sliding import slide_windows
from .transfer import send
from .transport import class_sinkhorn
from .unit import unit
from .unsure_box import unsure_box

__all__ = [
    'BoxOfEach', 'annealed_alpha', 'balance_scores', 'bank_energies',
    'bank_positives', 'bilinear_at', 'block_grid', 'block_mask',
    'blocks_of_classes', 'box_counts', 'box_size', 'centres', 'check_choice',
    'choose_classes', 'choose_offsets', 'class_contrast_loss', 'class_mask',
    'class_moments', 'class_sinkhorn', 'class_thresholds', 'class_variance',
    'color_jitter', 'complement_weights', 'confidence_histogram',
    'confident_fraction', 'contrast_loss', 'contrast_regularizer',
    'crop_to_box', 'crop_windows', 'downscale_labels', 'draw_crop_box',
    'draw_offsets', 'draw_per_group', 'ema_update', 'entropy_threshold',
    'except_self', 'forked_rng', 'full_precision', 'fuse_detail',
    'gather_moments', 'gather_new', 'gaussian_blur', 'gaussian_energies',
    'generator_at', 'hard_and_easy',
    'hard_labels', 'hardest_negatives', 'hide_blocks', 'ignored_last',
    'image_class_means', 'joint_weights', 'known_labels', 'labels_at',
    'logit_probabilities', 'masked_feature_distance', 'merge_moments',
    'merge_windows', 'mix', 'mixed_energies', 'moved_prototypes', 'normalized',
    'only_finite', 'over_thresholds', 'own_class', 'own_probability',
    'pair_agreement_loss', 'pair_contrast_loss', 'pixel_entropy',
    'place_weights', 'places_in_box', 'pool_moments', 'position_seed',
    'present_classes', 'prototype_consistency', 'prototype_distances',
    'prototype_energies', 'prototype_scores', 'push', 'push_members',
    'put_on_canvas', 'queue_negatives', 'rank_in_groups', 'reco_loss',
    'rectified', 'reference_blur_radius', 'resolution_contrast', 'same_label',
    'same_label_across_images', 'same_pair', 'same_top_features',
    'sampled_contrast_loss', 'scale_box', 'send', 'similar_class_negatives',
    'slide_boxes', 'slide_windows', 'split_weights', 'symmetric_cross_entropy',
    'teacher_topk', 'temperature_scale', 'top_scored', 'top_scored_members',
    'u2pl_loss', 'uniform_divergence', 'unit', 'unreliable_class_members',
    'unsure_box', 'variance_energies', 'within', 'within_box',
    'without_classes'
]
