# MIC (Hoyer et al., CVPR 2023) beside another method: the student also learns
# from images of which most blocks are hidden. One half of the batch is of the
# source, the other of the target with the teacher's labels; no strong
# augmentation (published as separate, for a batch of 1 + 1).
mic = dict(
    views=dict(
        target_labelled=dict(
            type='PseudoLabelled', view='target', pseudo_label='target'),
        halves=dict(
            type='Halves', first='source', second='target_labelled'),
        masked=dict(type='BlockMask', view='halves', block=64, ratio=0.7)),
    objectives=dict(masked=dict(type='Segmentation', view='masked')))
