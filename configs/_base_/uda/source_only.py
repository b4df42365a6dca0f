# The control of DACS: as many passes and the same strong augmentation, but
# no pixel of the target. The teacher only averages the student's weights.
uda = dict(
    teachers=dict(
        ema=dict(type='EMATeacher', alpha=0.99, batch_norm='ema')),
    views=dict(
        strong=dict(
            type='StrongAugment', view='source', jitter_strength=0.25)),
    objectives=dict(
        source=dict(
            type='Segmentation', view='source', accuracy_interval=50),
        strong=dict(type='Segmentation', view='strong')))
