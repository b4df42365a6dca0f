# SePiCo (Xie et al., TPAMI 2023): DAFormer's self-training on class-balanced
# crops of the target, and contrast of strongly augmented images.
uda = dict(
    teachers=dict(ema=dict(type='EMATeacher', alpha=0.999)),
    pseudo_labels=dict(
        target_full=dict(
            type='ConfidentFraction', view='target', threshold=0.968),
        target=dict(
            type='ConfidentFraction', view='target_crop', threshold=0.968)),
    views=dict(
        target_crop=dict(
            type='BalancedCrop', size=(640, 640), max_ratio=0.75),
        mixed=dict(type='ClassMix', target='target_crop'),
        source_strong=dict(type='StrongAugment', view='source'),
        target_strong=dict(type='StrongAugment', view='target_crop'),
        mixed_strong=dict(type='StrongAugment', view='mixed')),
    objectives=dict(
        source=dict(
            type='Segmentation', view='source_strong', accuracy_interval=50),
        mixed=dict(type='Segmentation', view='mixed_strong'),
        contrast=dict(
            type='Contrast',
            anchors=('source_strong', 'target_strong'),
            bank=('source', ),
            bank_from='teacher',
            teacher='ema',
            pseudo_labels=dict(target_strong='target'))))
