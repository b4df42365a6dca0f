_base_ = ['./dacs.py', '../../_base_/contrast/balanced.py']
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=[8, 16, 32, 112],
            in_index=[0, 1, 2, 3], input_transform='resize_concat',
            num_classes=_base_.pair.num_classes)),
    objectives=dict(contrast=_base_.contrast.objective))
