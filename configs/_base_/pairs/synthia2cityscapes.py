# SYNTHIA to Cityscapes, the 19 classes of Cityscapes, crops of 512 x 512.
# docs/datasets.md: how to get the files and convert the labels.
# SYNTHIA has no terrain, truck and train: results are those of 16 or 13
# classes.
pair_source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(1280, 760), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
# No cat_max_ratio: it would look at the target's labels.
pair_target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair_tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=size, keep_ratio=True)
             for size in ((768, 384),
                          (1024, 512),
                          (1280, 640))],
            [dict(type='RandomFlip', prob=0., direction='horizontal'),
             dict(type='RandomFlip', prob=1., direction='horizontal')],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ]),
]
pair = dict(
    num_classes=19,
    # DAFormer draws rare classes of the source first, and trusts no
    # pseudo-label at the upper and lower edge (pixels of the full image).
    rare_class=dict(temperature=0.01, min_pixels=3000, min_crop_ratio=0.5),
    margins=dict(type='MarkValidRegion', top=30, bottom=240),
    tta_pipeline=pair_tta_pipeline,
    evaluator=dict(
        type='FieldIoUMetric',
        class_subsets=dict(mIoU16='synthia16', mIoU13='synthia13')),
    train_dataloader=dict(
        batch_size=2,
        num_workers=4,
        persistent_workers=True,
        sampler=dict(type='PositionSampler'),
        dataset=dict(
            type='StreamDataset',
            streams=dict(
                source=dict(
                    dataset=dict(
                        type='SynthiaDataset',
                        data_root='data/synthia',
                        pipeline=pair_source_pipeline),
                    labelled=True),
                target=dict(
                    dataset=dict(
                        type='CityscapesDataset',
                        data_root='data/cityscapes',
                        data_prefix=dict(img_path='leftImg8bit/train'),
                        pipeline=pair_target_pipeline),
                    labelled=False)))),
    test_dataloader=dict(
        batch_size=1,
        num_workers=4,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CityscapesDataset',
            data_root='data/cityscapes',
            data_prefix=dict(
                img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
            pipeline=pair_test_pipeline)),
    # tools/test.py --server: the test split, whose labels are not public
    server_dataloader=dict(
        batch_size=1,
        num_workers=4,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CityscapesDataset',
            data_root='data/cityscapes',
            data_prefix=dict(img_path='leftImg8bit/test'),
            pipeline=pair_test_pipeline)),
    server_evaluator=dict(type='SubmissionMetric', format='cityscapes'))
