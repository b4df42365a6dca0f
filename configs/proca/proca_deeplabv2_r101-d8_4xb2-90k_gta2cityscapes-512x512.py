_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv2_r101-d8_fada-lovasz.py',
    '../_base_/schedules/sgd_90k.py',
    '../_base_/pairs/gta2cityscapes.py',
    '../_base_/contrast/proca.py',
]
# Contrast of features and of logits, from SDCA's stage 1 on.
load_from = ('work_dirs/sdca-stage1_deeplabv2_r101-d8_4xb2-20k_gta2cityscapes-'
             '512x512/iter_20000.pth')
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        backbone=dict(
            _base_.model.backbone, norm_eval=False,
            norm_cfg=dict(type='BN', requires_grad=True)),
        auxiliary_head=[
            dict(_base_.contrast.head, in_channels=2048, num_classes=19),
            dict(_base_.contrast.logits_head, in_channels=19, channels=19,
                 num_classes=19),
        ]),
    pseudo_labels=dict(
        target=dict(type='ConfidentPixels', teacher='student', threshold=0.9)),
    objectives=dict(
        source=dict(type='Segmentation', view='source'),
        contrast=dict(_base_.contrast.objective, head='aux_0'),
        contrast_logits=dict(_base_.contrast.objective, head='aux_1')))
train_dataloader = _base_.pair.train_dataloader
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
custom_hooks = [
    *_base_.custom_hooks, dict(type='PrototypeInitHook', correct_only=True),
    dict(type='ContrastHealthHook')]
