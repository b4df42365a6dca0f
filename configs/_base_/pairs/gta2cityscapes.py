# GTA5 with train ids (`*_labelTrainIds.png`) to Cityscapes, 512 x 512 crops.
pair_source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(1280, 720)),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512)),
    dict(type='RandomCrop', crop_size=(512, 512)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512)),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair = dict(
    num_classes=19,
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
                        type='CityscapesDataset',
                        data_root='data/gta',
                        data_prefix=dict(
                            img_path='images', seg_map_path='labels'),
                        img_suffix='.png',
                        seg_map_suffix='_labelTrainIds.png',
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
            pipeline=pair_test_pipeline)))
