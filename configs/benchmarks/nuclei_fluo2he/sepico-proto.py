_base_ = ['./dacs.py', '../../_base_/contrast/sepico-proto.py']
# A 20th of the published iterations and a tenth of its width.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=[8, 16, 32, 112],
            in_index=[0, 1, 2, 3], input_transform='resize_concat',
            num_classes=_base_.pair.num_classes, channels=64,
            projection=dict(layers=2, hidden_channels=42, last_act=True),
            start=60)),
    objectives=dict(contrast=_base_.contrast.objective))
