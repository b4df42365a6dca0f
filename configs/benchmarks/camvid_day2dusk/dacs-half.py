# A control of HRDA: DACS on what HRDA's context sees, crops and images of half
# the side.
_base_ = './dacs.py'
source = _base_.pair_source_pipeline
source[2].scale, source[3].crop_size = (240, 180), (128, 128)
target = _base_.pair_target_pipeline
target[1].scale, target[2].crop_size = (240, 180), (128, 128)
train_dataloader = dict(
    dataset=dict(
        streams=dict(
            source=dict(dataset=dict(pipeline=source)),
            target=dict(dataset=dict(pipeline=target)))))
# Predictions come back at the size of the labels.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(240, 180), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
data_preprocessor = dict(size=(128, 128))
model = dict(segmentor=dict(data_preprocessor=data_preprocessor))
