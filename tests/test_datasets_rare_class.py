"""Rare-class sampling: pinned probabilities, thresholds, caps, recrops."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch

from datasets_common import CLASSES, files_pipeline, folder, write_folder
from mmseg_contrast.datasets import (
    RareClassDraw,
    StreamDataset,
    class_statistics,
    rare_class_probabilities,
)
from mmseg_contrast.datasets.rare_class import item_probabilities


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_CONTRAST_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def test_published_probabilities():
    """Recorded from DAFormer's code; classes in rising frequency."""
    pixels = np.zeros(19)
    pixels[[0, 2, 10, 11, 16, 18]] = [900000, 250000, 120000, 9000, 1000, 500]
    order = [18, 16, 11, 10, 2, 0]
    cold = rare_class_probabilities(pixels, 0.01)
    np.testing.assert_allclose(
        cold[order],
        [.403766, .388304, .207895, 3.5741e-5, 1.39344e-9, 1.2551e-31],
        rtol=2e-5)
    warm = rare_class_probabilities(pixels, 0.1)
    np.testing.assert_allclose(
        warm[order],
        [.288305, .287182, .269789, .113385, .0410817, 2.56512e-4],
        rtol=2e-5)
    hot = rare_class_probabilities(pixels, np.inf)
    np.testing.assert_allclose(hot[order], 1 / 6)
    assert cold[1] == warm[1] == hot[1] == 0


COUNTS = np.array([[90, 10, 0], [95, 5, 0], [60, 40, 0], [100, 0, 0]])
SIZES = np.full(4, 100)


def make(**options) -> RareClassDraw:
    return RareClassDraw(COUNTS, SIZES, CLASSES, 'source',
                         **dict(dict(temperature=0.5, min_pixels=8),
                                **options))


def test_joint_probabilities():
    draw = make()
    p = np.exp([(1 - 345 / 400) / .5, (1 - 55 / 400) / .5])
    p /= p.sum()
    assert {(int(i), int(c)): q
            for (i, c), q in zip(draw.pairs, draw.probabilities, strict=True)
            } == pytest.approx({
                (0, 0): p[0] / 4, (1, 0): p[0] / 4, (2, 0): p[0] / 4,
                (3, 0): p[0] / 4, (0, 1): p[1] / 2, (2, 1): p[1] / 2})


def test_draws_follow_the_probabilities():
    draw = make()
    np.random.seed(0)
    found = np.zeros((4, 2))
    for _ in range(4000):
        item, label = draw.draw()
        found[item, label] += 1
    want = np.zeros((4, 2))
    for (i, c), q in zip(draw.pairs, draw.probabilities, strict=True):
        want[i, c] = q
    np.testing.assert_allclose(found / 4000, want, atol=0.025)


def test_threshold_as_fraction_equals_pixels():
    a, b = make(min_pixels=8), make(min_pixels=0.08)
    assert np.array_equal(a.pairs, b.pairs)
    # more than, not at least
    assert len(make(min_pixels=10).pairs) == 5


@pytest.mark.parametrize('min_pixels, found', [(50, '40 pixels'),
                                               (0.5, '0.4 of an image')])
def test_class_without_a_usable_file(min_pixels, found):
    with pytest.raises(ValueError, match=re.escape(found)) as caught:
        make(min_pixels=min_pixels)
    assert "'car'" in str(caught.value)
    assert '`streams.source.rare_class.min_pixels`' in str(caught.value)


def test_cap_on_repeats():
    """By hand: item 2 and 0 are above the limit, the rest has room."""
    free = item_probabilities(make(), 4)
    capped = make(max_repeats_per_file=1.5)
    got = item_probabilities(capped, 4)
    limit = 1.5 / 4
    assert free[0] > limit and free[1] < limit
    kept = np.minimum(free, limit)
    room = limit - kept
    np.testing.assert_allclose(got, kept + (1 - kept.sum()) * room /
                               room.sum())
    assert got.sum() == pytest.approx(1) and got.max() <= limit + 1e-12
    # the freed draws have no class, and only go where there is room
    extra = capped.pairs[capped.pairs[:, 1] == -1, 0]
    assert extra.tolist() == [1, 3]
    np.testing.assert_allclose(
        item_probabilities(make(max_repeats_per_file=1), 4), 0.25)
    # a generous cap changes nothing
    same = make(max_repeats_per_file=4)
    assert np.array_equal(same.probabilities, make().probabilities)


@pytest.mark.parametrize('option', [
    dict(temperature=0), dict(min_pixels=-1), dict(min_pixels=1.5),
    dict(min_crop_ratio=-1), dict(max_recrops=1.5),
    dict(max_repeats_per_file=0.5)
])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f'rare_class.{next(iter(option))}`'):
        make(**option)


def test_accepts():
    labels = torch.zeros(10, 10, dtype=torch.long)
    labels[0, :4] = 1
    assert not make().accepts(labels, 1)  # 4 is not more than 8 * 0.5
    labels[0, 4] = 1
    assert make().accepts(labels, 1)
    assert make(min_pixels=0.08).accepts(labels, 1)
    assert not make(min_pixels=0.1).accepts(labels, 1)
    assert not make(min_crop_ratio=1.0).accepts(labels, 1)


def corner_labels(count: int = 6) -> np.ndarray:
    """All road; image 0 alone has a block of cars in a corner."""
    labels = np.zeros((count, 24, 32), dtype=np.uint8)
    labels[0, :8, :8] = 1
    return labels


CROP = dict(type='RandomCrop', crop_size=(12, 12))


def rare_stream(root, **options) -> StreamDataset:
    return StreamDataset(dict(source=dict(
        dataset=folder(root, files_pipeline(CROP)),
        rare_class=dict(dict(min_pixels=20), **options))))


def test_recrops_and_decodes_once(tmp_path, monkeypatch):
    from mmcv.transforms import LoadImageFromFile
    root = write_folder(tmp_path / 'a', 6, labels=corner_labels())
    dataset = rare_stream(root, max_recrops=200, min_crop_ratio=1.0)
    reads, real = [], LoadImageFromFile.transform
    monkeypatch.setattr(
        LoadImageFromFile, 'transform',
        lambda self, r: reads.append(r['img_path']) or real(self, r))
    cars = [int((dataset[p]['data_samples']['source'].gt_sem_seg.data ==
                 1).sum()) for p in range(20)]
    # with T = 0.01 the class car is always drawn, and only image 0 has it
    assert {p[-7:] for p in reads} == {'000.png'} and len(reads) == 20
    assert min(cars) > 20
    few = rare_stream(root, max_recrops=0)
    cars = [int((few[p]['data_samples']['source'].gt_sem_seg.data == 1).sum())
            for p in range(20)]
    assert min(cars) == 0
    # a function of the position still
    again = rare_stream(root, max_recrops=200, min_crop_ratio=1.0)
    assert torch.equal(again[7]['inputs']['source'],
                       dataset[7]['inputs']['source'])


def test_files_are_decoded_once_and_labels_of_the_target_never(
        tmp_path, monkeypatch):
    """However often a crop is drawn again."""
    import mmcv
    source = write_folder(tmp_path / 's', 6, labels=corner_labels())
    target = write_folder(tmp_path / 't', 3)
    dataset = StreamDataset(dict(
        source=dict(
            dataset=folder(source, files_pipeline(CROP)),
            rare_class=dict(min_pixels=20, max_recrops=200,
                            min_crop_ratio=1.0)),
        target=dict(labelled=False,
                    dataset=folder(target, files_pipeline(CROP)))))
    dataset[0]  # labels were read to be checked and counted
    decoded, crops, real = [], [], mmcv.imfrombytes
    monkeypatch.setattr(
        mmcv, 'imfrombytes', lambda content, *args, **kwargs: decoded.append(
            content) or real(content, *args, **kwargs))
    for reader in dataset.streams['source'].readers:
        finish = reader.finish
        reader.finish = lambda *args, finish=finish, **kwargs: crops.append(
            1) or finish(*args, **kwargs)
    for position in range(1, 11):
        dataset[position]
    assert len(crops) > 20
    assert len(decoded) == 10 * (2 + 1)
    labels = {(target / 'ann_dir' / f'{i:03d}.png').read_bytes()
              for i in range(3)}
    assert not labels & set(decoded)


def test_capped_stream_spreads(tmp_path):
    root = write_folder(tmp_path / 'a', 6, labels=corner_labels())
    dataset = rare_stream(root, max_repeats_per_file=1.2)
    paths = [dataset[p]['data_samples']['source'].img_path[-7:]
             for p in range(150)]
    share = paths.count('000.png') / 150
    assert abs(share - 0.2) < 0.07 and len(set(paths)) == 6


def test_statistics_are_kept_and_renewed(tmp_path, cache, monkeypatch):
    root = write_folder(tmp_path / 'a', 6, labels=corner_labels())
    rare_stream(root)
    files = list(cache.iterdir())
    assert len(files) == 1 and files[0].suffix == '.json'
    stored = json.loads(files[0].read_text())
    assert stored['classes'] == list(CLASSES)
    assert stored['total'] == dict(road=6 * 768 - 64, car=64, sky=0)
    assert stored['pixels'][0] == [704, 64, 0]
    import mmseg_contrast.datasets.class_stats as module
    counted, real = [], module._count
    monkeypatch.setattr(
        module, '_count', lambda *a: counted.append(1) or real(*a))
    rare_stream(root)
    assert not counted
    # another time of change, another label map: counted again
    os.utime(root / 'ann_dir/003.png', ns=(1, 1))
    rare_stream(root)
    assert len(counted) == 1 and len(list(cache.iterdir())) == 2
    StreamDataset(dict(source=dict(
        dataset=folder(root, files_pipeline(CROP)),
        label_map=dict(classes=CLASSES, ignore=['sky']),
        rare_class=dict(min_pixels=20))))
    assert len(counted) == 2
    # half a file is no statistics
    files[0].write_text('{"key": ')
    os.utime(root / 'ann_dir/003.png')
    for file in cache.iterdir():
        file.write_text(file.read_text()[:40])
    rare_stream(root)
    assert len(counted) == 3
    assert not list(cache.glob('*.tmp'))


def test_stats_file(tmp_path, cache):
    root = write_folder(tmp_path / 'a', 6, labels=corner_labels())
    file = tmp_path / 'here/stats.json'
    rare_stream(root, stats_file=str(file))
    assert file.exists() and not cache.exists()


def test_other_ranks_get_the_error(tmp_path, monkeypatch):
    import mmseg_contrast.datasets.class_stats as module
    sent = []

    def fail(*args):
        raise ValueError('label file broken')

    monkeypatch.setattr(module, '_read_or_count', fail)
    monkeypatch.setattr(module, 'broadcast_object_list',
                        lambda data: sent.append(list(data)))
    with pytest.raises(ValueError, match='label file broken'):
        class_statistics([], np.zeros((0, 2)), CLASSES, 'source')
    assert sent == [['label file broken']]
    # a rank that only listens
    monkeypatch.setattr(module, 'is_main_process', lambda: False)

    def receive(data):
        data[0] = 'label file broken'

    monkeypatch.setattr(module, 'broadcast_object_list', receive)
    with pytest.raises(ValueError, match='label file broken'):
        class_statistics([], np.zeros((0, 2)), CLASSES, 'source')
