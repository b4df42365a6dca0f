_base_ = ['./dacs.py', '../../_base_/contrast/sdca.py']
model = dict(
    segmentor=dict(
        auxiliary_head=[
            dict(_base_.contrast.head, in_channels=112, channels=112,
                 num_classes=_base_.pair.num_classes),
            dict(_base_.contrast.logits_head,
                 in_channels=_base_.pair.num_classes,
                 channels=_base_.pair.num_classes,
                 num_classes=_base_.pair.num_classes),
        ]),
    objectives=dict(
        contrast=dict(_base_.contrast.objective, head='aux_0'),
        contrast_logits=dict(_base_.contrast.objective, head='aux_1')))
