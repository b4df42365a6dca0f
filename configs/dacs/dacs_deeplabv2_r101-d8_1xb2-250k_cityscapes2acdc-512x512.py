_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv2_r101-d8.py',
    '../_base_/schedules/sgd_250k.py',
    '../_base_/pairs/cityscapes2acdc.py',
    '../_base_/uda/dacs.py',
]
model = dict(
    _delete_=True, type='UDASegmentor', segmentor=_base_.model, **_base_.uda)
train_dataloader = _base_.pair.train_dataloader
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
custom_hooks = [
    *_base_.custom_hooks, dict(type='UDAVisualizationHook', interval=1000),
    dict(type='PseudoLabelHealthHook')]
