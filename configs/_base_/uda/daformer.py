# DAFormer (Hoyer et al., CVPR 2022): self-training with ClassMix, a slower
# teacher, and features that stay near ImageNet's on thing classes.
uda = dict(
    teachers=dict(ema=dict(type='EMATeacher', alpha=0.999)),
    pseudo_labels=dict(
        target=dict(
            type='ConfidentFraction',
            teacher='ema',
            view='target',
            threshold=0.968)),
    views=dict(
        mixed=dict(type='ClassMix', class_scope='batch'),
        mixed_strong=dict(
            type='StrongAugment', view='mixed', jitter_strength=0.2)),
    objectives=dict(
        source=dict(
            type='Segmentation', view='source', accuracy_interval=50),
        feature_distance=dict(
            type='FeatureDistance',
            view='source',
            weight=0.005,
            classes=(6, 7, 11, 12, 13, 14, 15, 16, 17, 18),
            min_ratio=0.75),
        mixed=dict(type='Segmentation', view='mixed_strong')))
