_base_ = './daformer.py'
# Ablation: no feature distance.
model = dict(objectives=dict(
    _delete_=True,
    source=dict(type='Segmentation', view='source'),
    mixed=dict(type='Segmentation', view='mixed_strong')))
