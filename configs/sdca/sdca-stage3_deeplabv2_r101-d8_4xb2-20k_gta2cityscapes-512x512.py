_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv2_r101-d8_fada.py',
    '../_base_/schedules/sgd_20k_of_31k.py',
    '../_base_/pairs/gta2cityscapes.py',
]
# Stage 3 of 3: the target alone, with the labels that stage 2 gave it.
load_from = ('work_dirs/sdca_deeplabv2_r101-d8_4xb2-40k_gta2cityscapes-'
             '512x512/iter_40000.pth')
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        backbone=dict(
            _base_.model.backbone, norm_eval=False,
            norm_cfg=dict(type='BN', requires_grad=True))),
    pseudo_labels=dict(target=dict(type='StoredPseudoLabels')),
    views=dict(target_labelled=dict(type='PseudoLabelled')),
    objectives=dict(
        target=dict(type='Segmentation', view='target_labelled')))
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.pop('source')
train_dataloader.dataset.streams.target.pseudo_labels = (
    'data/pseudo_labels/sdca_gta2cityscapes')
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
