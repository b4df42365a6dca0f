_base_ = [
    '../daformer/daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py',
    '../_base_/contrast/pipa.py',
]
# DAFormer and PiPa's pixel loss; not its patch loss.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=[64, 128, 320, 512],
            in_index=[0, 1, 2, 3], input_transform='resize_concat',
            num_classes=19)),
    objectives=dict(contrast=_base_.contrast.objective))
custom_hooks = [*_base_.custom_hooks, dict(type='ContrastHealthHook')]
