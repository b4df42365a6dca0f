# Cell nuclei: fluorescence (bright on dark) to stained tissue (dark on light).
classes = ('background', 'nucleus')
palette = [[0, 0, 0], [220, 60, 220]]
metainfo = dict(classes=classes, palette=palette)
source_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(256, 256)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
target_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=(256, 256)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackStreamInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
source = dict(
    type='BaseSegDataset',
    metainfo=metainfo,
    data_root='data/nuclei_fluo',
    data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
    pipeline=source_pipeline)
target = dict(
    type='BaseSegDataset',
    metainfo=metainfo,
    data_root='data/nuclei_he',
    data_prefix=dict(img_path='img_dir/train'),
    pipeline=target_pipeline)
pair = dict(
    num_classes=2,
    train_dataloader=dict(
        batch_size=2,
        num_workers=1,
        persistent_workers=True,
        sampler=dict(type='PositionSampler'),
        dataset=dict(
            type='StreamDataset',
            streams=dict(
                source=dict(dataset=source, labelled=True, cache=True),
                target=dict(dataset=target, labelled=False, cache=True)))),
    test_dataloader=dict(
        batch_size=1,
        num_workers=1,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='BaseSegDataset',
            metainfo=metainfo,
            data_root='data/nuclei_he',
            data_prefix=dict(
                img_path='img_dir/test', seg_map_path='ann_dir/test'),
            pipeline=test_pipeline)))
