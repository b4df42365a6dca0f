_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r101-d8.py',
    '../_base_/schedules/sgd_40k.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/contrast/contrastive-seg-memory.py',
]
# The published memory has one anchor of each class in an image, and 0.07.
model = dict(
    type='ContrastEncoderDecoder',
    auxiliary_head=[
        _base_.model.auxiliary_head,
        dict(_base_.contrast.head, in_channels=2048, num_classes=19,
             projection=dict(layers=2, norm_cfg=dict(type='SyncBN')),
             sampler=dict(type='HardEasy', max_samples=1024, max_views=1),
             tau=0.07),
    ])
custom_hooks = [*_base_.custom_hooks, dict(type='ContrastHealthHook')]
