"""Streams: draws by position, items, wrappers, nothing read from labels."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadAnnotations
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import DataLoader

from datasets_common import files_pipeline, folder, streets, write_folder
from mmseg_contrast.datasets import (
    LoadSyntheticLabels,
    PositionSampler,
    StreamDataset,
)

CROP = dict(type='RandomCrop', crop_size=(16, 24))
FLIP = dict(type='RandomFlip', prob=0.5)


def build(**streams) -> StreamDataset:
    return DATASETS.build(dict(type='StreamDataset', streams=streams))


def pair(sources: int = 6, targets: int = 5, **target) -> StreamDataset:
    return build(
        source=dict(dataset=streets('source', sources, CROP, FLIP)),
        target=dict(
            labelled=False,
            dataset=streets('target', targets, CROP, FLIP),
            **target))


def number(sample) -> int:
    return int(sample.img_path[-6:])


def numbers(dataset: StreamDataset, stream: str, positions) -> list[int]:
    return [number(dataset[p]['data_samples'][stream]) for p in positions]


def test_item_layout_and_meta():
    dataset = pair(ratio=2)
    item = dataset[3]
    assert list(item) == ['inputs', 'data_samples']
    assert list(item['inputs']) == ['source', 'target']
    image = item['inputs']['source']
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 24)
    assert [t.shape for t in item['inputs']['target']] == [(3, 16, 24)] * 2
    source = item['data_samples']['source']
    assert source.domain == 'source' and source.ori_shape == (32, 64)
    assert source.gt_sem_seg.data.shape == (1, 16, 24)
    assert all('gt_sem_seg' not in s and s.domain == 'target'
               for s in item['data_samples']['target'])
    assert len(dataset) == 6
    assert dataset.metainfo['classes'][0] == 'road'
    assert len(dataset.metainfo['palette']) == 10


def test_every_epoch_is_another_permutation():
    dataset = pair()
    epochs = [numbers(dataset, 'source', range(e * 6, e * 6 + 6))
              for e in range(3)]
    assert all(sorted(e) == list(range(6)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    # the target walks through its own length
    assert sorted(numbers(dataset, 'target', range(5, 10))) == [0, 1, 2, 3, 4]
    # and with a ratio of 2 twice as fast
    twice = pair(targets=6, ratio=2)
    seen = [number(s) for p in range(3)
            for s in twice[p]['data_samples']['target']]
    assert sorted(seen) == list(range(6))


def test_draws_depend_on_seed_and_position_alone():
    one, two = pair(), pair()
    far = 10**9 + 7
    a = one[far]
    for p in (0, 5, 3):
        two[p]
    b = two[far]
    for stream in ('source', 'target'):
        assert torch.equal(a['inputs'][stream], b['inputs'][stream])
        assert (a['data_samples'][stream].img_path ==
                b['data_samples'][stream].img_path)
    two.set_seed(1)
    assert not torch.equal(a['inputs']['source'], two[far]['inputs']['source'])


def test_another_stream_changes_nothing():
    alone = build(source=dict(dataset=streets('source', 6, CROP, FLIP)))
    assert torch.equal(alone[4]['inputs']['source'],
                       pair()[4]['inputs']['source'])


def test_global_random_states_are_given_back():
    dataset = pair()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    want = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    dataset[2]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == want


def loader(dataset, workers: int, skip: int = 0) -> list[dict]:
    sampler = DATA_SAMPLERS.build(
        dict(type='PositionSampler'), default_args=dict(
            dataset=dataset, seed=11))
    sampler.skip(skip)
    batches = iter(DataLoader(dataset, batch_size=2, sampler=sampler,
                              num_workers=workers,
                              collate_fn=pseudo_collate))
    return [next(batches) for _ in range(4)]


def test_workers_do_not_matter():
    dataset = pair()
    want = loader(dataset, 0)
    assert isinstance(want[0]['inputs']['source'], list)
    for workers in (1, 3):
        for a, b in zip(want, loader(dataset, workers), strict=True):
            for stream in ('source', 'target'):
                for x, y in zip(a['inputs'][stream], b['inputs'][stream],
                                strict=True):
                    assert torch.equal(x, y)


def test_sampler_positions(monkeypatch):
    class Sized(list):
        seed = None

        def set_seed(self, seed):
            self.seed = seed

    data = Sized(range(5))
    sampler = PositionSampler(data, seed=9)
    head = iter(sampler)
    assert [next(head) for _ in range(7)] == [0, 1, 2, 3, 4, 5, 6]
    assert data.seed == 9 and len(sampler) == 5
    import mmseg_contrast.datasets.sampler as module
    monkeypatch.setattr(module, 'get_dist_info', lambda: (1, 3))
    sampler = PositionSampler(data, seed=9)
    sampler.skip(4)
    sampler.skip(4)  # absolute: twice is once
    head = iter(sampler)
    assert [next(head) for _ in range(3)] == [13, 16, 19]
    # Nothing is walked through: these would not end.
    sampler.skip(10**15)
    assert next(iter(sampler)) == 3 * 10**15 + 1
    with pytest.raises(ValueError, match='num_samples'):
        sampler.skip(-1)


@pytest.mark.parametrize('weights, shares', [
    (None, {'a': 4, 'b': 2}),
    ([1, 1], {'a': 3, 'b': 3}),
    ([1, 0], {'a': 6}),
])
def test_several_datasets_have_their_shares(tmp_path, weights, shares):
    pipe = files_pipeline()
    configs = [
        folder(write_folder(tmp_path / name, count), pipe)
        for name, count in (('a', 4), ('b', 2))
    ]
    dataset = build(source=dict(datasets=configs, dataset_weights=weights))
    assert len(dataset) == 6
    for epoch in range(2):
        paths = [dataset[6 * epoch + i]['data_samples']['source'].img_path
                 for i in range(6)]
        roots = Counter(p.split('/')[-3] for p in paths)
        assert roots == shares
    # over four epochs every image of a dataset comes equally often
    paths = Counter(dataset[i]['data_samples']['source'].img_path
                    for i in range(24))
    for name, count in (('a', 4), ('b', 2)):
        want = shares.get(name, 0) * 4 / count
        found = [n for p, n in paths.items() if f'/{name}/' in p]
        assert found == [want] * (count if want else 0)


def test_stock_wrappers(tmp_path):
    part = folder(write_folder(tmp_path / 'a', 3), files_pipeline(CROP))
    wrapped = dict(
        type='ConcatDataset',
        datasets=[dict(type='RepeatDataset', dataset=part, times=2), part])
    dataset = build(source=dict(dataset=wrapped, cache=True))
    assert len(dataset) == 9
    paths = Counter(dataset[i]['data_samples']['source'].img_path
                    for i in range(9))
    assert sorted(paths.values()) == [3, 3, 3]


def test_multi_image_mix_dataset(tmp_path):
    part = folder(write_folder(tmp_path / 'a', 3),
                  files_pipeline()[:2])
    mixed = dict(
        type='MultiImageMixDataset',
        dataset=part,
        pipeline=[
            dict(type='RandomMosaic', prob=1.0, img_scale=(24, 32)),
            dict(type='PackSegInputs')
        ])
    dataset = build(source=dict(dataset=mixed))
    image = dataset[7]['inputs']['source']
    assert image.shape == (3, 48, 64)
    assert torch.equal(image, dataset[7]['inputs']['source'])
    with pytest.raises(ValueError, match='streams.source.cache'):
        build(source=dict(dataset=mixed, cache=True))


@pytest.mark.parametrize('ratio', [0, 1.5, True, '2'])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match=r'`streams\.target\.ratio`'):
        pair(ratio=ratio)


def test_target_labels_are_never_read(tmp_path, monkeypatch):
    root = write_folder(tmp_path / 't', 3)
    for file in (root / 'ann_dir').iterdir():
        file.unlink()

    def never(self, results):
        raise AssertionError('a label was read')

    # any way of mmcv, mmseg and ours to read a label
    for kind in [LoadAnnotations, *LoadAnnotations.__subclasses__()]:
        monkeypatch.setattr(kind, 'transform', never)
    assert LoadSyntheticLabels.transform is never
    nested = [dict(type='LoadImageFromFile'),
              dict(type='RandomApply', prob=1.0,
                   transforms=[dict(type='LoadAnnotations')]),
              dict(type='PackSegInputs')]
    dataset = build(
        source=dict(labelled=False, dataset=streets('source', 3)),
        target=dict(
            labelled=False,
            datasets=[folder(root, pipe, classes=None)
                      for pipe in (files_pipeline(), nested)]))
    for p in range(12):
        samples = dataset[p]['data_samples']
        assert all('gt_sem_seg' not in s for s in samples.values())
        assert all('seg_map_path' not in s for s in samples.values())
    with pytest.raises(ValueError, match='a label was read'):
        build(source=dict(dataset=streets('source', 3)))


def test_unlabelled_stream_refuses_labels_by_another_loader(tmp_path):
    from mmcv.transforms import BaseTransform

    class Sneaky(BaseTransform):

        def transform(self, results):
            results['gt_seg_map'] = np.zeros(results['img'].shape[:2])
            return results

    pipe = [dict(type='LoadImageFromFile'), Sneaky(),
            dict(type='PackSegInputs')]
    with pytest.raises(ValueError, match='is unlabelled, but'):
        build(target=dict(
            labelled=False, dataset=folder(write_folder(tmp_path / 'a'),
                                           pipe)))


def test_cache_reads_once_and_is_not_changed(tmp_path, monkeypatch):
    from mmcv.transforms import BaseTransform, LoadImageFromFile

    class Blacken(BaseTransform):
        """Writes into the arrays it gets."""

        def transform(self, results):
            results['img'][:, np.random.randint(4):] = 0
            results['gt_seg_map'][:] = 0
            results['seg_fields'].append('img')
            return results

    reads = []
    real = LoadImageFromFile.transform
    monkeypatch.setattr(
        LoadImageFromFile, 'transform',
        lambda self, r: reads.append(r['img_path']) or real(self, r))
    root = write_folder(tmp_path / 'a', 3)
    pipe = files_pipeline(CROP)
    plain = build(source=dict(dataset=folder(root, pipe)))
    cached = build(source=dict(dataset=folder(root, pipe), cache=True))
    reads.clear()
    for p in range(9):
        assert torch.equal(cached[p]['inputs']['source'],
                           plain[p]['inputs']['source'])
    assert Counter(Counter(reads).values()) == {3: 1, 4: 2}
    writing = files_pipeline()
    writing.insert(2, Blacken())
    dirty = build(source=dict(dataset=folder(root, writing), cache=True))
    for p in range(9):
        dirty[p]
    for reader in dirty.streams['source'].readers:
        for results in reader._cache.values():
            assert results['img'][:, 4:].any()
            assert results['gt_seg_map'].any()
            assert results['seg_fields'] == ['gt_seg_map']


def test_length_is_that_of_the_first_stream():
    dataset = build(
        source=dict(dataset=streets('source', 24)),
        target=dict(labelled=False,
                    dataset=streets('target', 3)))
    assert len(dataset) == 24


def test_a_sampler_makes_no_list_of_positions():
    class Long:
        def __len__(self):
            return 10**15

    sampler = PositionSampler(Long(), seed=0)
    positions = iter(sampler)
    assert [next(positions) for _ in range(3)] == [0, 1, 2]


def test_rejected_images_are_replaced(tmp_path):
    from mmcv.transforms import BaseTransform

    class Odd(BaseTransform):
        """Rejects every second image."""

        def transform(self, results):
            return results if int(results['img_path'][-7:-4]) % 2 else None

    class Nothing(BaseTransform):

        def transform(self, results):
            return None

    root = write_folder(tmp_path / 'a', 4)
    pipe = files_pipeline()
    dataset = build(source=dict(
        dataset=folder(root, [*pipe[:2], Odd(), pipe[2]])))
    for p in range(8):
        path = dataset[p]['data_samples']['source'].img_path
        assert int(path[-7:-4]) % 2
    dataset = build(source=dict(
        dataset=folder(root, [*pipe[:2], Nothing(), pipe[2]])))
    with pytest.raises(ValueError, match='rejected 10 images in a row.*png'):
        dataset[0]
