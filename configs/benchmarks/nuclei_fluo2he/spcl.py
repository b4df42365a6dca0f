_base_ = ['./dacs.py', '../../_base_/contrast/spcl.py']
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=112, channels=112,
            num_classes=_base_.pair.num_classes)),
    objectives=dict(contrast=_base_.contrast.objective))
