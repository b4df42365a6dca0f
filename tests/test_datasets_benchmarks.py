"""GTA5, SYNTHIA, ACDC and the night sets: what is read, and what not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS
from test_dataset_converters import (
    IDS,
    TRAIN_IDS,
    run,
    write_acdc,
    write_cityscapes,
    write_dark_zurich,
    write_gta,
    write_image,
    write_nighttime,
    write_palette,
    write_synthia_tree,
)

from datasets_common import files_pipeline
from mmseg_contrast.datasets import (
    ACDCDataset,
    GTADataset,
    StreamDataset,
    SynthiaDataset,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_CONTRAST_CACHE', str(tmp_path / 'cache'))


def paths(dataset, key: str = 'img_path') -> list[str]:
    root = f'{dataset.data_root}/'
    return [dataset.get_data_info(i)[key].removeprefix(root)
            for i in range(len(dataset))]


@pytest.fixture
def gta(tmp_path) -> Path:
    """Converted; 00002 is of another size than its image."""
    root = write_gta(tmp_path / 'gta', 4)
    write_palette(root / 'labels/00002.png', IDS[1:])
    assert run('gta', root) == 0
    return root


# -- GTA5 -----------------------------------------------------------------
def test_gta_reads_the_good_pairs(gta):
    dataset = GTADataset(data_root=str(gta))
    assert paths(dataset) == [f'images/0000{i}.png' for i in (1, 3, 4)]
    assert paths(dataset, 'seg_map_path') == [
        f'labels/0000{i}_labelTrainIds.png' for i in (1, 3, 4)]
    stock = CityscapesDataset.METAINFO
    assert dataset.metainfo['classes'] == stock['classes']
    assert dataset.metainfo['palette'] == stock['palette']
    assert len(dataset.metainfo['classes']) == 19
    assert paths(GTADataset(data_root=str(gta), ann_file='')) == [
        f'images/0000{i}.png' for i in (1, 2, 3, 4)]
    (gta / 'mine.txt').write_text('00004\n')
    assert paths(GTADataset(data_root=str(gta), ann_file='mine.txt')) == [
        'images/00004.png']
    (gta / 'pairs.txt').unlink()
    assert len(GTADataset(data_root=str(gta))) == 4


def test_gta_without_the_list_names_the_missing_label(gta):
    stream = dict(source=dict(dataset=dict(
        type='GTADataset', data_root=str(gta), ann_file='',
        pipeline=files_pipeline())))
    with pytest.raises(ValueError, match='1 of 4 images have no label file, '
                       'the first missing one is .*00002_labelTrainIds.png'):
        StreamDataset(stream)


def test_gta_with_outputs_elsewhere(tmp_path):
    root, out = write_gta(tmp_path / 'gta'), tmp_path / 'out'
    write_palette(root / 'labels/00002.png', IDS[1:])
    assert run('gta', root, '--out-dir', out) == 0
    dataset = GTADataset(
        data_root=str(root), ann_file=str(out / 'pairs.txt'),
        data_prefix=dict(img_path='images', seg_map_path=str(out / 'labels')),
        pipeline=files_pipeline())
    assert [dataset[i]['data_samples'].gt_sem_seg.data[0, 0].tolist()
            for i in range(2)] == [np.roll(TRAIN_IDS, s)[0].tolist()
                                   for s in (0, 2)]


def test_subset_of_the_classes(gta):
    dataset = GTADataset(
        data_root=str(gta), pipeline=files_pipeline(),
        metainfo=dict(classes=('car', 'road')))
    seen = dataset[0]['data_samples'].gt_sem_seg.data[0]
    want = np.full_like(TRAIN_IDS, 255)
    want[TRAIN_IDS == 13] = 0
    want[TRAIN_IDS == 0] = 1
    np.testing.assert_array_equal(seen.numpy(), want)


def test_gta_stream_with_rare_classes_decodes_once(gta, monkeypatch):
    """However often the crop is drawn again."""
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets.transforms import LoadAnnotations, Resize
    dataset = StreamDataset(dict(source=dict(
        dataset=dict(
            type='GTADataset', data_root=str(gta),
            pipeline=files_pipeline(
                dict(type='Resize', scale=(16, 10)),
                dict(type='RandomCrop', crop_size=(4, 4)))),
        rare_class=dict(temperature=1e9, min_pixels=0, max_recrops=50))))
    stream = dataset.streams['source']
    # every train id once, but 0, which has six pixels; T of 1e9 is uniform
    np.testing.assert_allclose(
        stream.rare_class.class_probabilities, 1 / 19, rtol=1e-6)
    reads, crops = [], []

    def counted(kind, method, calls):
        real = getattr(kind, method)
        monkeypatch.setattr(
            kind, method,
            lambda self, r: calls.append(kind.__name__) or real(self, r))

    for kind in (LoadImageFromFile, LoadAnnotations, Resize):
        counted(kind, 'transform', reads)
    finish = type(stream.readers[0]).finish
    monkeypatch.setattr(
        type(stream.readers[0]), 'finish',
        lambda *a, **k: crops.append(1) or finish(*a, **k))
    for position in range(30):
        seen = dataset[position]['data_samples']['source'].gt_sem_seg.data
        assert seen.shape == (1, 4, 4)
        assert set(seen.unique().tolist()) <= {*range(19), 255}
    for kind in (LoadImageFromFile, LoadAnnotations, Resize):
        assert reads.count(kind.__name__) == 30
    assert len(crops) > 60


# -- SYNTHIA --------------------------------------------------------------
def test_synthia(tmp_path):
    root = write_synthia_tree(tmp_path / 'synthia')
    assert run('synthia', root) == 0
    dataset = SynthiaDataset(data_root=str(root), pipeline=files_pipeline())
    assert paths(dataset) == ['RGB/0000000.png', 'RGB/0000001.png']
    assert dataset.metainfo['classes'] == (
        CityscapesDataset.METAINFO['classes'])
    # ids 0 to 22 are in this file; the real ones lack 16, 18 and 20
    seen = dataset[0]['data_samples'].gt_sem_seg.data
    assert seen.unique().tolist() == [*range(19), 255]
    assert seen[0, 0, :4].tolist() == [255, 10, 2, 0]


def test_synthia_stream(tmp_path):
    root = write_synthia_tree(tmp_path / 'synthia')
    config = dict(type='SynthiaDataset', data_root=str(root),
                  pipeline=files_pipeline())
    # unlabelled: not converted yet
    StreamDataset(dict(target=dict(labelled=False, dataset=config)))
    with pytest.raises(ValueError, match='2 of 2 images have no label file'):
        StreamDataset(dict(source=dict(dataset=config)))
    assert run('synthia', root) == 0
    dataset = StreamDataset(dict(source=dict(
        dataset=config, rare_class=dict(min_pixels=0))))
    assert 'gt_sem_seg' in dataset[0]['data_samples']['source']


# -- ACDC -----------------------------------------------------------------
STEM = '{0}/{1}/GOPR0475/GOPR0475_frame_000041'


@pytest.mark.parametrize('split', ['train', 'val'])
def test_acdc(tmp_path, split):
    root = write_acdc(tmp_path)
    dataset = ACDCDataset(data_root=str(root), split=split)
    conditions = ('fog', 'night', 'rain', 'snow')
    assert paths(dataset) == [
        f'rgb_anon/{STEM.format(c, split)}_rgb_anon.png' for c in conditions]
    assert paths(dataset, 'seg_map_path') == [
        f'gt/{STEM.format(c, split)}_gt_labelTrainIds.png'
        for c in conditions]
    some = ACDCDataset(data_root=str(root), split=split,
                       conditions=['snow', 'fog'])
    assert paths(some) == [
        f'rgb_anon/{STEM.format(c, split)}_rgb_anon.png'
        for c in ('fog', 'snow')]


def test_acdc_test_split_has_no_labels(tmp_path):
    root = write_acdc(tmp_path)
    dataset = ACDCDataset(data_root=str(root), split='test')
    assert len(dataset) == 4
    assert 'seg_map_path' not in dataset.get_data_info(0)


def test_acdc_reference_images_are_left_out(tmp_path):
    root = write_acdc(tmp_path)
    # even where they are named as the others
    write_image(root / f'rgb_anon/{STEM.format("fog", "train_ref")}'
                '_rgb_anon.png')
    assert len(ACDCDataset(data_root=str(root))) == 4
    assert len(ACDCDataset(data_root=str(root), conditions=('fog', ))) == 1


def test_acdc_streams(tmp_path):
    root = write_acdc(tmp_path)
    config = dict(type='ACDCDataset', data_root=str(root))
    dataset = StreamDataset(dict(
        source=dict(
            dataset=dict(config, pipeline=files_pipeline()),
            rare_class=dict(min_pixels=0)),
        target=dict(
            labelled=False,
            dataset=dict(config, conditions=['night'],
                         pipeline=files_pipeline(labels=False))),
        test=dict(
            labelled=False,
            dataset=dict(config, split='test', pipeline=files_pipeline()))))
    item = dataset[0]['data_samples']
    assert torch.equal(item['source'].gt_sem_seg.data[0],
                       torch.from_numpy(TRAIN_IDS).long())
    assert 'gt_sem_seg' not in item['target']
    assert '/night/train/' in item['target'].img_path
    assert '/test/' in item['test'].img_path
    # the labels of a labelled stream must be there
    (root / f'gt/{STEM.format("rain", "train")}_gt_labelTrainIds.png'
     ).unlink()
    with pytest.raises(ValueError, match='1 of 4 images have no label file, '
                       'the first missing one is .*gt/rain/train'):
        StreamDataset(dict(source=dict(
            dataset=dict(config, pipeline=files_pipeline()))))


@pytest.mark.parametrize('options, text', [
    (dict(split='train_ref'), "ACDCDataset.split must be .*'train_ref'"),
    (dict(conditions=['fog', 'day']), 'conditions must be .*day'),
    (dict(conditions='fog'), "conditions must be a list .*'fog'"),
    (dict(conditions=[]), 'conditions must be a list')])
def test_acdc_options(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        ACDCDataset(data_root=str(write_acdc(tmp_path)), **options)


# -- the night sets of mmseg ----------------------------------------------
def test_dark_zurich(tmp_path):
    root = write_dark_zurich(tmp_path)
    config = dict(type='DarkZurichDataset', data_root=str(root))
    night = dict(
        config, data_prefix=dict(img_path='rgb_anon/train/night'),
        pipeline=files_pipeline(labels=False))
    val = dict(
        config, data_prefix=dict(img_path='rgb_anon/val/night',
                                 seg_map_path='gt/val/night'),
        pipeline=files_pipeline())
    assert paths(DATASETS.build(night)) == [
        f'rgb_anon/train/night/{s}/{s}_frame_000321_rgb_anon.png'
        for s in ('GOPR0351', 'GOPR0352')]
    dataset = StreamDataset(dict(
        source=dict(dataset=val), target=dict(labelled=False, dataset=night)))
    item = dataset[0]['data_samples']
    assert torch.equal(item['source'].gt_sem_seg.data[0],
                       torch.from_numpy(TRAIN_IDS).long())
    assert 'gt_sem_seg' not in item['target']


def test_nighttime_driving(tmp_path):
    root = write_nighttime(tmp_path)
    dataset = DATASETS.build(dict(
        type='NightDrivingDataset', data_root=str(root),
        data_prefix=dict(
            img_path='leftImg8bit/test/night',
            seg_map_path='gtCoarse_daytime_trainvaltest/test/night'),
        pipeline=files_pipeline()))
    assert len(dataset) == 2
    np.testing.assert_array_equal(
        dataset[1]['data_samples'].gt_sem_seg.data[0].numpy(), TRAIN_IDS)


# -- mistakes -------------------------------------------------------------
CLASSES = dict(GTADataset='images', SynthiaDataset='RGB',
               ACDCDataset='rgb_anon/fog/train')


@pytest.mark.parametrize('kind, folder', CLASSES.items())
def test_missing_and_empty_folders(tmp_path, kind, folder):
    config = dict(type=kind, data_root=str(tmp_path))
    gone = re.escape(f'{kind}: the folder {tmp_path}/{folder} does not exist')
    with pytest.raises(ValueError, match=gone):
        DATASETS.build(config)
    stream = dict(source=dict(dataset=dict(
        config, pipeline=files_pipeline())))
    with pytest.raises(ValueError, match=gone) as caught:
        StreamDataset(stream)
    assert 'data_prefix.img_path' in str(caught.value)
    for name in (folder, folder.replace('fog', 'night'),
                 folder.replace('fog', 'rain'), folder.replace('fog', 'snow')):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=re.escape(
            f'{kind}: no image found in {tmp_path}/{folder}; check')):
        StreamDataset(stream)


def test_one_missing_condition(tmp_path):
    root = write_acdc(tmp_path)
    (root / 'rgb_anon/rain/val').rename(root / 'rgb_anon/rain/other')
    with pytest.raises(ValueError, match='rgb_anon/rain/val does not exist'):
        ACDCDataset(data_root=str(root), split='val')
    assert len(ACDCDataset(data_root=str(root), split='val',
                           conditions=['fog', 'night', 'snow'])) == 3


# -- the guide ------------------------------------------------------------
def test_every_config_of_the_guide_reads_its_tree(tmp_path, monkeypatch):
    write_gta(tmp_path / 'data/gta')
    write_synthia_tree(tmp_path / 'data/synthia')
    write_cityscapes(tmp_path / 'data/cityscapes')
    write_acdc(tmp_path / 'data/acdc')
    write_dark_zurich(tmp_path / 'data/dark_zurich')
    write_nighttime(tmp_path / 'data/NighttimeDrivingTest')
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'docs/datasets.md').read_text()
    for tool in sorted((ROOT / 'tools/dataset_converters').glob('*.py')):
        main = runpy.run_path(str(tool))['main']
        assert main(['--nproc', '1']) == 0
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    built = []
    for block in blocks:
        for config in re.split(r'\n(?=dict)', block.strip()):
            config = eval(config)
            if config['type'] == 'StreamDataset':
                # the files here are tiny
                source = config['streams']['source']
                source['rare_class']['min_pixels'] = 0
            dataset = DATASETS.build(config)
            assert len(dataset) > 0
            built.append(config['type'])
    assert sorted(set(built)) == [
        'ACDCDataset', 'CityscapesDataset', 'DarkZurichDataset', 'GTADataset',
        'NightDrivingDataset', 'StreamDataset', 'SynthiaDataset']
    assert dataset[0]['inputs']['source'].shape == (3, 512, 512)
    assert '/night/train/' in dataset[0]['data_samples']['target'].img_path
