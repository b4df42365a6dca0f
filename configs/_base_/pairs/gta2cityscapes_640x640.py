# GTA5 to Cityscapes with SePiCo's sizes: crops of 640 x 640 of the
# source, and whole images of the target, of which the model takes crops.
_base_ = './gta2cityscapes.py'
pair_source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(1280, 720), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(640, 640), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
# 15 and 120 rows of the resized image get no pseudo-labels.
pair_target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MarkValidRegion', top=15 / 640, bottom=120 / 640),
    dict(type='Resize', scale=(1280, 640), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1280, 640), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair = dict(
    train_dataloader=dict(
        dataset=dict(
            streams=dict(
                source=dict(dataset=dict(pipeline=pair_source_pipeline)),
                target=dict(dataset=dict(pipeline=pair_target_pipeline))))),
    test_dataloader=dict(dataset=dict(pipeline=pair_test_pipeline)),
    server_dataloader=dict(dataset=dict(pipeline=pair_test_pipeline)))
