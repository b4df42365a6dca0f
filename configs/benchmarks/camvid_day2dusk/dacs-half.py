# A control of HRDA: DACS on what HRDA's context sees, crops and images of half
# the side.
_base_ = './dacs.py'
half = dict(
    type='RandomResize', scale=(240, 180), ratio_range=(0.75, 1.5),
    keep_ratio=True)
train_dataloader = dict(
    dataset=dict(
        streams=dict(
            source=dict(
                dataset=dict(pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations'),
                    half,
                    dict(type='RandomCrop', crop_size=(128, 128),
                         cat_max_ratio=0.75),
                    dict(type='RandomFlip', prob=0.5),
                    dict(type='PhotoMetricDistortion'),
                    dict(type='PackStreamInputs'),
                ])),
            target=dict(
                dataset=dict(pipeline=[
                    dict(type='LoadImageFromFile'),
                    half,
                    dict(type='RandomCrop', crop_size=(128, 128)),
                    dict(type='RandomFlip', prob=0.5),
                    dict(type='PackStreamInputs'),
                ])))))
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
