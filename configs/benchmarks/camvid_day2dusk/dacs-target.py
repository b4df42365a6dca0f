# A control of contrast: DACS with a third pass of the student, over the
# target as it is, which learns from the same pseudo-labels by cross entropy.
_base_ = './dacs.py'
model = dict(
    views=dict(target_labelled=dict(type='PseudoLabelled')),
    objectives=dict(
        target=dict(type='Segmentation', view='target_labelled')))
