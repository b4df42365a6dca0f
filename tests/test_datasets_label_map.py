"""Label maps: many-to-one by name, applied before anything else looks."""

from __future__ import annotations

import numpy as np
import pytest

from datasets_common import CLASSES, files_pipeline, folder, write_folder
from mmseg_contrast.datasets import LabelMap, StreamDataset

OWN = ('road', 'autorickshaw', 'rider', 'static', 'person')
TARGET = ('person', 'road', 'vehicle', 'train')
MAPPING = {'autorickshaw': 'vehicle', 'rider': 'person', 'static': None}


def test_table():
    table = LabelMap(TARGET, MAPPING).table(OWN, 'source')
    assert table[:5].tolist() == [1, 2, 0, 255, 0]
    assert table[255] == 255 and set(table[5:255]) == {-1}
    same = LabelMap(TARGET, {'autorickshaw': 'vehicle', 'rider': 'person'},
                    ignore=['static'])
    assert np.array_equal(table, same.table(OWN, 'streams.source'))


def test_words():
    label_map = LabelMap(TARGET, MAPPING)
    text = label_map.describe(OWN, 'source')
    assert 'person  <- rider, person' in text
    assert 'ignored: static' in text
    assert 'classes without a source: train' in text
    assert 'absent_classes' in text
    assert label_map.absent(OWN) == ['train']


def test_palette():
    own = [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4], [5, 5, 5]]
    colours = LabelMap(TARGET, MAPPING).colours(OWN, own)
    assert colours == [[5, 5, 5], [1, 1, 1], [2, 2, 2], [204, 204, 204]]
    given = [[9, 9, 9]] * 4
    assert LabelMap(TARGET, MAPPING, given).colours(OWN, own) == given


@pytest.mark.parametrize('make, texts', [
    (lambda: LabelMap(()), 'label_map.classes'),
    (lambda: LabelMap(('a', 'a')), 'label_map.classes'),
    (lambda: LabelMap(TARGET, {'rider': 'human'}), "'human'"),
    (lambda: LabelMap(TARGET, palette=[[0, 0, 0]]), 'label_map.palette'),
    (lambda: LabelMap(TARGET).table(OWN, 'streams.source'),
     r"\['autorickshaw', 'rider', 'static'\].*streams.source.label_map"),
])
def test_refusals(make, texts):
    with pytest.raises(ValueError, match=texts):
        make()


def stream(tmp_path, labels, label_map, *steps, **options) -> StreamDataset:
    root = write_folder(tmp_path / 'a', len(labels), labels=labels)
    return StreamDataset(dict(source=dict(
        dataset=folder(root, files_pipeline(*steps), **options),
        label_map=label_map)))


def labels_of(dataset, position=0):
    return dataset[position]['data_samples']['source'].gt_sem_seg.data[0]


def test_mapped_in_the_stream(tmp_path):
    labels = np.arange(1 * 24 * 32).reshape(1, 24, 32) % 3
    labels[0, 0, 0] = 255
    dataset = stream(
        tmp_path, labels.astype(np.uint8),
        dict(classes=('moving', 'road'), mapping=dict(car='moving',
                                                      sky=None)))
    want = np.array([1, 0, 255])[labels[0] % 3]
    want[0, 0] = 255
    assert np.array_equal(labels_of(dataset).numpy(), want)
    assert dataset.metainfo['classes'] == ('moving', 'road')
    assert dataset.metainfo['palette'] == [[1, 1, 1], [0, 0, 0]]


def test_crops_see_mapped_ids(tmp_path):
    """car and sky become one class: no crop shows two classes above 0.75."""
    from mmcv.transforms import BaseTransform

    class Look(BaseTransform):
        seen: list = []

        def transform(self, results):
            self.seen.append(set(np.unique(results['gt_seg_map'])))
            return results

    labels = np.ones((1, 24, 32), dtype=np.uint8)
    labels[:, :12] = 2
    stream(tmp_path, labels, dict(classes=('road', 'thing'), mapping=dict(
        car='thing', sky='thing')), Look())
    assert Look.seen == [{1}]


def test_on_top_of_reduce_zero_label_and_own_label_map(tmp_path):
    labels = np.zeros((1, 24, 32), dtype=np.uint8)
    labels[0, 0, :4] = [0, 1, 2, 3]
    dataset = stream(tmp_path, labels, dict(
        classes=('x', ), mapping=dict(road=None, car=None, sky='x')),
        reduce_zero_label=True)
    assert labels_of(dataset)[0, :4].tolist() == [255, 255, 255, 0]
    # mmseg's own label_map: a dataset class built with a subset of classes
    streets = dict(
        type='SyntheticStreets', num_images=2, size=(64, 32),
        metainfo=dict(classes=('sky', 'road')),
        pipeline=[dict(type='LoadSyntheticImage'),
                  dict(type='LoadSyntheticLabels'),
                  dict(type='PackSegInputs')])
    both = StreamDataset(dict(source=dict(
        dataset=streets, label_map=dict(
            classes=('ground', 'top'),
            mapping=dict(sky='top', road='ground')))))
    found = labels_of(both)
    assert found.unique().tolist() == [0, 1, 255]
    assert (found[0] == 1).any() and (found[-1] == 0).any()


def test_entry_for_an_unknown_class(tmp_path):
    labels = np.zeros((1, 24, 32), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"mapping` names \['carr'\]"):
        stream(tmp_path, labels, dict(
            classes=CLASSES, mapping=dict(carr='car')))


def test_brings_streams_together(tmp_path):
    root = write_folder(tmp_path / 'a')
    other = folder(root, files_pipeline(), classes=('road', 'lorry', 'sky'))
    dataset = StreamDataset(dict(
        source=dict(dataset=folder(root, files_pipeline())),
        target=dict(labelled=False, dataset=other, label_map=dict(
            classes=CLASSES, mapping=dict(lorry='car')))))
    assert 'gt_sem_seg' not in dataset[0]['data_samples']['target']


def test_a_dataset_for_validation_is_mapped_too(tmp_path):
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS
    init_default_scope('mmseg')
    labels = np.tile(np.array([[0, 1, 2, 0], [2, 2, 255, 1]], np.uint8),
                     (12, 8))
    root = write_folder(tmp_path / 'a', 1, labels=[labels])
    plain = folder(root, files_pipeline())
    classes = tuple(plain['metainfo']['classes'])
    merged = dict(classes=('x', 'y'),
                  mapping={c: 'y' if i == 2 else 'x'
                           for i, c in enumerate(classes)})
    mapped = DATASETS.build(dict(
        type='MappedDataset', dataset=plain, label_map=merged))
    assert len(mapped) == 1 and mapped.metainfo['classes'] == ('x', 'y')
    assert len(mapped.metainfo['palette']) == 2
    got = mapped[0]['data_samples'].gt_sem_seg.data[0].numpy()
    want = np.where(labels == 255, 255, (labels == 2).astype(int))
    assert np.array_equal(got, want)
    with pytest.raises(ValueError, match='MappedDataset.label_map.mapping'):
        DATASETS.build(dict(type='MappedDataset', dataset=plain,
                            label_map=dict(classes=('x', ))))
