_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/hrda_mit-b5.py',
    '../_base_/schedules/adamw_40k_warmup.py',
    '../_base_/pairs/gta2cityscapes_1024x1024.py',
    '../_base_/uda/daformer.py',
]
model = dict(
    _delete_=True, type='UDASegmentor', segmentor=_base_.model, **_base_.uda)
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.source.rare_class = _base_.pair.rare_class
train_dataloader.dataset.streams.target.dataset.pipeline.insert(
    1, _base_.pair.margins)
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
custom_hooks = [
    *_base_.custom_hooks, dict(type='UDAVisualizationHook', interval=1000),
    dict(type='PseudoLabelHealthHook')]
