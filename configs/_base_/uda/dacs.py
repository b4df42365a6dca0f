# DACS (Tranheden et al., 2021): an EMA teacher labels the target, ClassMix
# pastes half of the source's classes over it, the student learns from both.
uda = dict(
    teachers=dict(ema=dict(type='EMATeacher', alpha=0.99)),
    pseudo_labels=dict(
        target=dict(
            type='ConfidentFraction',
            teacher='ema',
            view='target',
            threshold=0.968)),
    views=dict(
        mixed=dict(type='ClassMix', class_scope='sample'),
        mixed_strong=dict(
            type='StrongAugment', view='mixed', jitter_strength=0.25)),
    objectives=dict(
        source=dict(
            type='Segmentation', view='source', accuracy_interval=50),
        mixed=dict(type='Segmentation', view='mixed_strong')))
