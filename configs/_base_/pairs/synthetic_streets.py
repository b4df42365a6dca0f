# The embedded streets, by day and at dusk. No files needed.
pair_source_pipeline = [
    dict(type='LoadSyntheticImage'),
    dict(type='LoadSyntheticLabels'),
    dict(type='RandomResize', scale=(256, 128), ratio_range=(1.0, 1.5),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(128, 128), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_target_pipeline = [
    dict(type='LoadSyntheticImage'),
    dict(type='RandomResize', scale=(256, 128), ratio_range=(1.0, 1.5),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadSyntheticImage'),
    dict(type='LoadSyntheticLabels'),
    dict(type='PackSegInputs'),
]
pair = dict(
    num_classes=10,
    tta_pipeline=[
        dict(type='LoadSyntheticImage'),
        dict(
            type='TestTimeAug',
            transforms=[
                [dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                 for ratio in (0.75, 1.0, 1.25)],
                [dict(type='RandomFlip', prob=0., direction='horizontal'),
                 dict(type='RandomFlip', prob=1., direction='horizontal')],
                [dict(type='LoadSyntheticLabels')],
                [dict(type='PackSegInputs')],
            ]),
    ],
    train_dataloader=dict(
        batch_size=4,
        num_workers=1,
        persistent_workers=True,
        sampler=dict(type='PositionSampler'),
        dataset=dict(
            type='StreamDataset',
            streams=dict(
                source=dict(
                    dataset=dict(
                        type='SyntheticStreets',
                        domain='source',
                        pipeline=pair_source_pipeline),
                    labelled=True,
                    rare_class=dict(temperature=0.05, min_pixels=0.003),
                    cache=True),
                target=dict(
                    dataset=dict(
                        type='SyntheticStreets',
                        domain='target',
                        pipeline=pair_target_pipeline),
                    labelled=False,
                    cache=True)))),
    test_dataloader=dict(
        batch_size=1,
        num_workers=1,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='SyntheticStreets',
            domain='target',
            split='val',
            pipeline=pair_test_pipeline)))
