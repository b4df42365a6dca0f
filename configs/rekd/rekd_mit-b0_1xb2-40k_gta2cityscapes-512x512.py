_base_ = [
    '../daformer/daformer_mit-b0_1xb2-40k_gta2cityscapes-512x512.py',
    '../_base_/contrast/rekd.py',
]
# A light student, for which relation contrast was made.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=[32, 64, 160, 256],
            in_index=[0, 1, 2, 3], input_transform='resize_concat',
            num_classes=19)),
    objectives=dict(contrast=_base_.contrast.objective))
custom_hooks = [*_base_.custom_hooks, dict(type='ContrastHealthHook')]
