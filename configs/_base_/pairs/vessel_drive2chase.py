# Retinal vessels, DRIVE to CHASE_DB1: almost no shift, a sanity case.
pair_classes = ('background', 'vessel')
pair_palette = [[0, 0, 0], [220, 60, 60]]
pair_metainfo = dict(classes=pair_classes, palette=pair_palette)
pair_source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(584, 584), ratio_range=(0.75, 1.5),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackStreamInputs'),
]
pair_target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResize', scale=(584, 584), ratio_range=(0.75, 1.5),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(584, 584), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair_source = dict(
    type='BaseSegDataset',
    metainfo=pair_metainfo,
    data_root='data/vessel_drive',
    data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
    pipeline=pair_source_pipeline)
pair_target = dict(
    type='BaseSegDataset',
    metainfo=pair_metainfo,
    data_root='data/vessel_chase',
    data_prefix=dict(img_path='img_dir/train'),
    pipeline=pair_target_pipeline)
pair = dict(
    num_classes=2,
    things=(1, ),
    train_dataloader=dict(
        batch_size=2,
        num_workers=1,
        persistent_workers=True,
        sampler=dict(type='PositionSampler'),
        dataset=dict(
            type='StreamDataset',
            streams=dict(
                source=dict(dataset=pair_source, labelled=True, cache=True),
                target=dict(
                    dataset=pair_target, labelled=False, cache=True)))),
    test_dataloader=dict(
        batch_size=1,
        num_workers=1,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='BaseSegDataset',
            metainfo=pair_metainfo,
            data_root='data/vessel_chase',
            data_prefix=dict(
                img_path='img_dir/test', seg_map_path='ann_dir/test'),
            pipeline=pair_test_pipeline)))
