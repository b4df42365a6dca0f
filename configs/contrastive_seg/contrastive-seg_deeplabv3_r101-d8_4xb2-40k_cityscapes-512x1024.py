_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r101-d8.py',
    '../_base_/schedules/sgd_40k.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/contrast/contrastive-seg.py',
]
model = dict(
    type='ContrastEncoderDecoder',
    auxiliary_head=[
        _base_.model.auxiliary_head,
        dict(_base_.contrast.head, in_channels=2048, num_classes=19,
             projection=dict(layers=2, norm_cfg=dict(type='SyncBN'))),
    ])
custom_hooks = [*_base_.custom_hooks, dict(type='ContrastHealthHook')]
