_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/daformer_mit-b5.py',
    '../_base_/schedules/adamw_40k_warmup.py',
    '../_base_/pairs/cityscapes2acdc.py',
    '../_base_/uda/plain_source.py',
]
model = dict(
    _delete_=True, type='UDASegmentor', segmentor=_base_.model, **_base_.uda)
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.pop('target')
train_dataloader.dataset.streams.source.dataset.pipeline.insert(
    -1, dict(type='PhotoMetricDistortion'))
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
