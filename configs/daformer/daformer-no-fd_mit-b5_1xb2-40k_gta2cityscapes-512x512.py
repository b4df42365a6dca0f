_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
# Ablation: no feature distance.
model = dict(objectives=dict(
    _delete_=True,
    source=dict(
        type='Segmentation', view='source', accuracy_interval=50),
    mixed=dict(type='Segmentation', view='mixed_strong')))
