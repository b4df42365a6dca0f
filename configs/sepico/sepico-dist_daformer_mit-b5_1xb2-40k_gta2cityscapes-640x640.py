_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/daformer_mit-b5.py',
    '../_base_/schedules/adamw_40k_warmup.py',
    '../_base_/pairs/gta2cityscapes_640x640.py',
    '../_base_/uda/sepico.py',
    '../_base_/contrast/sepico-dist.py',
]
data_preprocessor = dict(size=(640, 640))
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        data_preprocessor=dict(_base_.data_preprocessor, size=(640, 640)),
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=[64, 128, 320, 512],
            in_index=[0, 1, 2, 3], input_transform='resize_concat',
            num_classes=19, projection=dict(
                layers=2, hidden_channels=256, last_act=True))),
    **_base_.uda)
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.source.rare_class = _base_.pair.rare_class
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
custom_hooks = [
    *_base_.custom_hooks, dict(type='UDAVisualizationHook', interval=1000),
    dict(type='PseudoLabelHealthHook'), dict(type='ContrastHealthHook')]
