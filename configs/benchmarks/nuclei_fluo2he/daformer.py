_base_ = [
    '../../_base_/default_runtime.py',
    '../../_base_/models/segformer_mobilenet-v2-w035.py',
    '../../_base_/schedules/adamw_cpu.py',
    '../../_base_/pairs/nuclei_fluo2he.py',
    '../../_base_/uda/daformer.py',
]
uda = _base_.uda
uda.objectives.feature_distance.classes = _base_.pair.things
model = dict(
    _delete_=True,
    type='UDASegmentor',
    segmentor=dict(
        _base_.model,
        backbone=dict(_base_.model.backbone, init_cfg=_base_.pretrained),
        decode_head=dict(
            _base_.model.decode_head, num_classes=_base_.pair.num_classes)),
    predict_with='both',
    **uda)
train_dataloader = _base_.pair.train_dataloader
train_dataloader.dataset.streams.source.rare_class = dict(
    temperature=0.05, min_pixels=0.005)
val_dataloader = test_dataloader = _base_.pair.test_dataloader
test_pipeline = test_dataloader.dataset.pipeline
val_evaluator = test_evaluator = [
    dict(type='FieldIoUMetric'),
    dict(type='FieldIoUMetric', field='teacher_pred_sem_seg',
         prefix='teacher'),
]
