"""Every mistake gets one sentence that names the file or the key."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from datasets_common import (
    CLASSES,
    files_pipeline,
    folder,
    streets,
    write_folder,
)
from mmseg_contrast.datasets import PositionSampler, StreamDataset

CROP = dict(type='RandomCrop', crop_size=(16, 16), cat_max_ratio=0.75)


@pytest.fixture
def root(tmp_path) -> Path:
    return write_folder(tmp_path / 'data', 4)


def source(root: Path, **options) -> dict:
    return dict(source=dict(
        dataset=folder(root, files_pipeline(), **options)))


def refuses(streams: dict, *texts: str) -> None:
    """Construction raises one sentence with all these texts."""
    with pytest.raises(ValueError) as caught:
        StreamDataset(streams)
    message = str(caught.value)
    assert '\n' not in message
    for text in texts:
        assert text in message, message


def test_no_stream_and_bad_names(root):
    refuses({}, '`streams`')
    refuses({'a.b': source(root)['source']}, "'a.b'")
    refuses({'loss': source(root)['source']}, "'loss'")
    refuses(dict(source=3), '`streams.source`')
    refuses(dict(source=dict()), '`streams.source`', '`dataset`')
    refuses(dict(source=dict(datasets=[])), '`streams.source.datasets`')


@pytest.mark.parametrize('key, meant', [('label', 'labelled'),
                                        ('rare_classes', 'rare_class'),
                                        ('dataset_weight',
                                         'dataset_weights')])
def test_misspelt_key(root, key, meant):
    streams = source(root)
    streams['source'][key] = True
    refuses(streams, '`streams.source`', repr(key), repr(meant))


def test_misspelt_key_in_sub_dicts(root):
    streams = source(root)
    streams['source']['rare_class'] = dict(min_pixel=3)
    refuses(streams, '`streams.source.rare_class`', "'min_pixels'")
    streams = source(root)
    streams['source']['label_map'] = dict(klasses=['a'])
    refuses(streams, '`streams.source.label_map`', "'klasses'")


def test_missing_folder(tmp_path):
    gone = tmp_path / 'gone'
    refuses(source(gone), "stream 'source'", str(gone))


def test_empty_stream(tmp_path):
    (tmp_path / 'img_dir').mkdir()
    refuses(
        dict(target=dict(
            labelled=False,
            dataset=folder(tmp_path, files_pipeline(labels=False)))),
        "stream 'target': no image found in", str(tmp_path / 'img_dir'))


def test_wrong_suffix_is_an_empty_stream(root):
    config = folder(root, files_pipeline())
    config['img_suffix'] = '.tiff'
    refuses(dict(source=dict(dataset=config)), 'no image found', 'img_suffix')


def test_missing_list(root):
    refuses(source(root, ann_file='nowhere.txt'), "'source'", 'nowhere.txt')


def test_missing_image(root):
    (root / 'list.txt').write_text('000\n007\n009\n')
    refuses(source(root, ann_file='list.txt'), '2 of 3 images are missing',
            str(root / 'img_dir/007.png'))


def test_missing_label(root):
    (root / 'ann_dir/001.png').unlink()
    (root / 'ann_dir/003.png').unlink()
    refuses(source(root), '2 of 4 images have no label',
            str(root / 'ann_dir/001.png'))


def test_unlabelled_needs_no_label(root):
    (root / 'ann_dir/001.png').unlink()
    StreamDataset(dict(target=dict(
        labelled=False, dataset=folder(root, files_pipeline()))))


def test_label_outside_the_classes_is_seen_at_once(tmp_path):
    labels = np.full((4, 24, 32), 2, dtype=np.uint8)
    labels[0, 3, 3] = 255
    labels[0, 5, 5] = 7
    root = write_folder(tmp_path / 'a', labels=labels)
    refuses(source(root), str(root / 'ann_dir/000.png'), 'id 7', '3 classes')


def test_label_outside_the_classes_later(tmp_path):
    labels = np.zeros((4, 24, 32), dtype=np.uint8)
    labels[:, 0, 0] = 255
    labels[3, 5, 5] = 3
    root = write_folder(tmp_path / 'a', labels=labels)
    dataset = StreamDataset(source(root))
    with pytest.raises(ValueError, match='003.png holds the id 3'):
        [dataset[p] for p in range(4)]


def test_other_ignore_index_of_the_dataset(tmp_path):
    labels = np.zeros((4, 24, 32), dtype=np.uint8)
    labels[:, 0, 0] = 200
    root = write_folder(tmp_path / 'a', labels=labels)
    dataset = StreamDataset(source(root, ignore_index=200))
    seen = dataset[0]['data_samples']['source'].gt_sem_seg.data
    assert seen.unique().tolist() == [0, 255]


@pytest.mark.parametrize('kind', ['png', 'jpg'])
def test_truncated_image(tmp_path, kind):
    root = write_folder(tmp_path / 'a', 3)
    if kind == 'jpg':
        for i in range(3):
            image = cv2.imread(str(root / f'img_dir/{i:03d}.png'))
            image = cv2.resize(image, (320, 240))
            cv2.imwrite(str(root / f'img_dir/{i:03d}.jpg'), image)
    file = root / f'img_dir/002.{kind}'
    file.write_bytes(file.read_bytes()[:file.stat().st_size * 2 // 3])
    config = folder(root, files_pipeline(labels=False), classes=None)
    config['img_suffix'] = f'.{kind}'
    dataset = StreamDataset(dict(target=dict(labelled=False, dataset=config)))
    with pytest.raises(ValueError, match=f"'target': cannot read the image "
                       f'.*002.{kind}'):
        [dataset[p] for p in range(3)]


def test_jpeg_with_trailing_bytes_passes(root):
    from mmseg_contrast.datasets.reader import refuse_truncated
    file = root / 'image.jpg'
    cv2.imwrite(str(file), np.zeros((8, 8, 3), np.uint8))
    file.write_bytes(file.read_bytes() + bytes(9000))
    refuse_truncated(str(file))


def test_unreadable_label_names_the_file(root):
    (root / 'ann_dir/002.png').write_bytes(b'no image')
    dataset = StreamDataset(source(root))
    with pytest.raises(ValueError, match='the label file .*ann_dir/002.png'):
        [dataset[p] for p in range(4)]


def test_worker_errors_reach_the_main_process(root):
    (root / 'img_dir/002.png').write_bytes(b'no image')
    dataset = StreamDataset(source(root))
    loader = iter(DataLoader(
        dataset, batch_size=1, num_workers=2, collate_fn=pseudo_collate,
        sampler=PositionSampler(dataset, seed=0)))
    with pytest.raises(ValueError) as caught:
        for _ in range(4):
            next(loader)
    loader._shutdown_workers()
    assert re.search("ValueError: stream 'source': cannot read the image .*"
                     'img_dir/002.png', str(caught.value))


def test_crop_that_wants_labels(root):
    for labels in (True, False):
        pipe = files_pipeline(CROP, labels=labels)
        refuses(dict(target=dict(labelled=False, dataset=folder(root, pipe))),
                '`streams.target.dataset.pipeline`', 'cat_max_ratio=1.0')


def test_failing_transform_is_named(root):
    pipe = files_pipeline(dict(type='GenerateEdge'), labels=False)
    refuses(dict(target=dict(labelled=False, dataset=folder(root, pipe))),
            'GenerateEdge of `streams.target.dataset.pipeline`', '000.png')


def test_no_pack_and_no_labels(root):
    refuses(dict(source=dict(
        dataset=folder(root, files_pipeline()[:-1]))), 'PackSegInputs')
    refuses(dict(source=dict(
        dataset=folder(root, files_pipeline(labels=False)))),
        'LoadAnnotations')


def test_classes_that_differ(root):
    other = ('road', 'lorry', 'sky')
    streams = source(root)
    streams['target'] = dict(
        labelled=False,
        dataset=folder(root, files_pipeline(), classes=other))
    refuses(streams, "'source'", "'target'", "'car' and 'lorry'",
            '`streams.target.label_map`')
    streams['target']['dataset'] = folder(
        root, files_pipeline(), classes=(*CLASSES, 'more'))
    refuses(streams, '3 and 4 classes')
    # without classes of its own an unlabelled stream is fine
    streams['target']['dataset'] = folder(
        root, files_pipeline(), classes=None)
    StreamDataset(streams)
    # a labelled one is not
    refuses(dict(source=dict(dataset=folder(
        root, files_pipeline(), classes=None))), 'declares no classes')


def test_classes_that_differ_inside_a_stream(root):
    configs = [folder(root, files_pipeline()),
               folder(root, files_pipeline(), classes=('a', 'b', 'c'))]
    refuses(dict(source=dict(datasets=configs)), "stream 'source'",
            "'road' and 'a'", 'label_map')


def test_weights(root):
    configs = [folder(root, files_pipeline())] * 2
    for weights in ([1], [0, 0], [1, -1]):
        refuses(dict(source=dict(datasets=configs, dataset_weights=weights)),
                '`streams.source.dataset_weights`')


def test_rare_class_needs_labels():
    refuses(dict(target=dict(
        labelled=False, rare_class=dict(),
        dataset=streets('target', 3))), '`streams.target.rare_class`')


def test_labelled_must_be_a_bool():
    refuses(dict(target=dict(
        labelled='no', dataset=streets('target', 3))),
        '`streams.target.labelled`')


def test_all_ignored_and_single_class_images_pass(tmp_path):
    labels = np.full((2, 24, 32), 255, dtype=np.uint8)
    labels[1] = 1
    root = write_folder(tmp_path / 'a', 2, labels=labels)
    dataset = StreamDataset(dict(source=dict(
        dataset=folder(root, files_pipeline(CROP)))))
    seen = {tuple(dataset[p]['data_samples']['source']
                  .gt_sem_seg.data.unique().tolist()) for p in range(2)}
    assert seen == {(255, ), (1, )}


def test_a_label_of_another_size_is_refused(tmp_path):
    root = write_folder(
        tmp_path / 'a', 1, labels=[np.zeros((30, 40), np.uint8)])
    with pytest.raises(ValueError, match=r'40 x 30 pixels.*32 x 24'):
        StreamDataset(dict(source=dict(dataset=folder(
            root, files_pipeline()))))


def test_a_label_in_colours_is_refused(tmp_path):
    root = write_folder(
        tmp_path / 'a', 1, labels=[np.zeros((24, 32, 3), np.uint8)])
    with pytest.raises(ValueError, match='one class id per pixel'):
        StreamDataset(dict(source=dict(dataset=folder(
            root, files_pipeline()))))
