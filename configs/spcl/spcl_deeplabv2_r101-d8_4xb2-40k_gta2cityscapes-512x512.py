_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv2_r101-d8_fada.py',
    '../_base_/schedules/sgd_40k_of_62k.py',
    '../_base_/pairs/gta2cityscapes.py',
    '../_base_/contrast/spcl.py',
]
# Stage 2 of 3: contrast, with target labels that stage 1 gave.
load_from = ('work_dirs/spcl-stage1_deeplabv2_r101-d8_4xb2-40k_gta2cityscapes-'
             '512x512/iter_40000.pth')
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=2048, num_classes=19)),
    pseudo_labels=dict(target=dict(type='StoredPseudoLabels')),
    objectives=dict(
        source=dict(type='Segmentation', view='source'),
        contrast=_base_.contrast.objective))
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.target.pseudo_labels = (
    'data/pseudo_labels/spcl-stage1_gta2cityscapes')
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
custom_hooks = [
    *_base_.custom_hooks, dict(type='PrototypeInitHook', correct_only=True),
    dict(type='ContrastHealthHook')]
