_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/segformer_mobilenet-v2-w035.py',
    '../_base_/schedules/adamw_cpu.py',
    '../_base_/pairs/synthetic_streets.py',
    '../_base_/uda/dacs.py',
]
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        data_preprocessor=dict(_base_.data_preprocessor, size=(128, 128)),
        decode_head=dict(_base_.model.decode_head, num_classes=10)),
    **_base_.uda)
data_preprocessor = dict(size=(128, 128))
train_dataloader = _base_.pair.train_dataloader
val_dataloader = test_dataloader = _base_.pair.test_dataloader
test_pipeline = test_dataloader.dataset.pipeline
tta_pipeline = _base_.pair.tta_pipeline
val_evaluator = test_evaluator = dict(type='FieldIoUMetric')
train_cfg = dict(val_interval=200)
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='UDAVisualizationHook', interval=200),
    dict(type='PseudoLabelHealthHook'),
]
