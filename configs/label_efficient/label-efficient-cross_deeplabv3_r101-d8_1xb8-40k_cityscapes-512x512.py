_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r101-d8.py',
    '../_base_/schedules/sgd_40k.py',
    '../_base_/pairs/cityscapes2acdc.py',
    '../_base_/contrast/label-efficient.py',
]
# Stage 1 of 2: contrast alone, with positives of other images too.
data_preprocessor = dict(size=(512, 512))
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        data_preprocessor=dict(_base_.data_preprocessor, size=(512, 512)),
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=512, num_classes=19,
            projection=dict(layers=3, hidden_channels=256, norm_cfg=None),
            bank=dict(type='BatchBank', scope='positives_across_images',
                      chunk_size=1024))),
    views=dict(strong=dict(type='StrongAugment', view='source')),
    objectives=dict(contrast=_base_.contrast.objective))
train_dataloader = dict(_base_.pair.train_dataloader, batch_size=8)
train_dataloader['dataset']['streams'].pop('target')
# There is no classifier to evaluate yet.
train_cfg = dict(val_interval=40001)
val_cfg = test_cfg = None
custom_hooks = [*_base_.custom_hooks, dict(type='ContrastHealthHook')]
