# MIC (Hoyer et al., CVPR 2023) beside another method: the student also learns
# the teacher's labels from target images of which most blocks are hidden.
# All of the target, with strong augmentation (published as separatetrgaug).
mic = dict(
    views=dict(
        target_labelled=dict(
            type='PseudoLabelled', view='target', pseudo_label='target'),
        target_strong=dict(
            type='StrongAugment', view='target_labelled',
            jitter_strength=0.2, share_order=True),
        masked=dict(
            type='BlockMask', view='target_strong', block=64, ratio=0.7)),
    objectives=dict(masked=dict(type='Segmentation', view='masked')))
