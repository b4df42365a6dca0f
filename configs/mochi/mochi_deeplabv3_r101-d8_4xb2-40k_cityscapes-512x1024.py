_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r101-d8.py',
    '../_base_/schedules/sgd_40k.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/contrast/contrastive-seg-memory.py',
]
# ContrastiveSeg with its memory, and MoCHi's synthetic negatives.
model = dict(
    type='ContrastEncoderDecoder',
    auxiliary_head=[
        _base_.model.auxiliary_head,
        dict(_base_.contrast.head, in_channels=2048, num_classes=19,
             projection=dict(layers=2, norm_cfg=dict(type='SyncBN')),
             sampler=dict(type='HardEasy', max_samples=1024, max_views=1),
             tau=0.07,
             mixing=dict(
                 type='HardNegativeMixing', hardest=32, mixes=16,
                 query_mixes=16, max_query_share=0.5)),
    ])
custom_hooks = [*_base_.custom_hooks, dict(type='ContrastHealthHook')]
