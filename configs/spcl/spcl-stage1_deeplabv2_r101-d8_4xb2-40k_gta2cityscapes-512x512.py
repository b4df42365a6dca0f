_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv2_r101-d8_fada.py',
    '../_base_/schedules/sgd_40k_of_62k.py',
    '../_base_/pairs/gta2cityscapes.py',
    '../_base_/uda/plain_source.py',
]
# Stage 1 of 3: the source alone. The published one is adversarial.
model = dict(
    _delete_=True, type='UDASegmentor', segmentor=_base_.model, **_base_.uda)
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.pop('target')
val_dataloader = test_dataloader = _base_.pair.test_dataloader
val_evaluator = test_evaluator = _base_.pair.evaluator
server_dataloader = _base_.pair.server_dataloader
server_evaluator = _base_.pair.server_evaluator
tta_pipeline = _base_.pair.tta_pipeline
