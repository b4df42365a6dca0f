# CamVid (Cambridge) to IDD-Lite (India): country, camera, vehicles, dust.
# Hyper-parameters are chosen on val_select, results reported on val_report.
pair_classes = ('drivable', 'non-drivable', 'living', 'vehicle', 'roadside',
                'far', 'sky')
pair_palette = [[128, 64, 128], [244, 35, 232], [220, 20, 60], [0, 0, 142],
                [250, 170, 30], [70, 70, 70], [70, 130, 180]]
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
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
pair_source = dict(
    type='BaseSegDataset',
    metainfo=pair_metainfo,
    data_root='data/camvid7',
    data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
    pipeline=pair_source_pipeline)
pair_target = dict(
    type='BaseSegDataset',
    metainfo=pair_metainfo,
    data_root='data/idd_lite7',
    data_prefix=dict(img_path='img_dir/train'),
    pipeline=pair_target_pipeline)
pair = dict(
    num_classes=7,
    things=(2, 3),  # living, vehicle
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
            data_root='data/idd_lite7',
            ann_file='splits/val_report.txt',
            data_prefix=dict(
                img_path='img_dir/val', seg_map_path='ann_dir/val'),
            pipeline=pair_test_pipeline)))
