# Cityscapes to DarkZurich with HRDA's sizes: the target's full resolution,
# crops of 1024 x 1024.
_base_ = './cityscapes2darkzurich.py'
pair_source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(2048, 1024), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(1024, 1024), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
# No cat_max_ratio: it would look at the target's labels.
pair_target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1920, 1080), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(1024, 1024)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1920, 1080), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair_tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=size, keep_ratio=True)
             for size in ((1440, 810),
                          (1920, 1080),
                          (2400, 1350))],
            [dict(type='RandomFlip', prob=0., direction='horizontal'),
             dict(type='RandomFlip', prob=1., direction='horizontal')],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ]),
]
pair = dict(
    # Four times the pixels of DAFormer's crops.
    rare_class=dict(min_crop_ratio=2.0),
    # Images without artefacts of rectification: nothing to leave out.
    margins=None,
    tta_pipeline=pair_tta_pipeline,
    train_dataloader=dict(
        dataset=dict(
            streams=dict(
                source=dict(dataset=dict(pipeline=pair_source_pipeline)),
                target=dict(dataset=dict(pipeline=pair_target_pipeline))))),
    test_dataloader=dict(dataset=dict(pipeline=pair_test_pipeline)),
    server_dataloader=dict(dataset=dict(pipeline=pair_test_pipeline)))
