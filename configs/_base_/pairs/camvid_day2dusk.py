# CamVid by day to CamVid at dusk: one city, one camera; light alone differs.
pair_classes = ('sky', 'building', 'pole', 'road', 'pavement', 'tree',
                'signsymbol', 'fence', 'car', 'pedestrian', 'bicyclist')
pair_palette = [[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128],
                [60, 40, 222], [128, 128, 0], [192, 128, 128], [64, 64, 128],
                [64, 0, 128], [64, 64, 0], [0, 128, 192]]
pair_metainfo = dict(classes=pair_classes, palette=pair_palette)
pair_source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackStreamInputs'),
]
pair_target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
pair_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair_source = dict(
    type='BaseSegDataset',
    metainfo=pair_metainfo,
    data_root='data/camvid11_day',
    data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
    pipeline=pair_source_pipeline)
pair_target = dict(
    type='BaseSegDataset',
    metainfo=pair_metainfo,
    data_root='data/camvid11_dusk',
    data_prefix=dict(img_path='img_dir/train'),
    pipeline=pair_target_pipeline)
pair = dict(
    num_classes=11,
    things=(6, 8, 9, 10),  # sign, car, pedestrian, bicyclist
    train_dataloader=dict(
        batch_size=2,
        num_workers=1,
        persistent_workers=True,
        sampler=dict(type='PositionSampler'),
        dataset=dict(
            type='StreamDataset',
            streams=dict(
                source=dict(
                    dataset=pair_source,
                    labelled=True,
                    rare_class=dict(temperature=0.05, min_pixels=0.005),
                    cache=True),
                target=dict(
                    dataset=pair_target, labelled=False, cache=True)))),
    test_dataloader=dict(
        batch_size=1,
        num_workers=1,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='BaseSegDataset',
            metainfo=pair_metainfo,
            data_root='data/camvid11_dusk',
            data_prefix=dict(
                img_path='img_dir/test', seg_map_path='ann_dir/test'),
            pipeline=pair_test_pipeline)))
