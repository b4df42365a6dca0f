"""Files for test servers: exact pixels, names, archive, ranks, mistakes."""

from __future__ import annotations

import fnmatch
import zipfile

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmseg.datasets import CityscapesDataset
from mmseg.registry import METRICS
from PIL import Image

from mmseg_contrast.evaluation import SubmissionMetric, submission

CLASSES = CityscapesDataset.METAINFO['classes']
# Of cityscapesScripts' table: what the server calls each class.
LABEL_IDS = {
    'road': 7, 'sidewalk': 8, 'building': 11, 'wall': 12, 'fence': 13,
    'pole': 17, 'traffic light': 19, 'traffic sign': 20, 'vegetation': 21,
    'terrain': 22, 'sky': 23, 'person': 24, 'rider': 25, 'car': 26,
    'truck': 27, 'bus': 28, 'train': 31, 'motorcycle': 32, 'bicycle': 33}
SIZES = dict(acdc=(1080, 1920), dark_zurich=(1080, 1920),
             cityscapes=(1024, 2048), plain=(5, 7))


def sample(path, size=(5, 7), classes=19, seed=0, field='pred_sem_seg'):
    rng = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, classes, (1, -(-size[0] // 8), -(-size[1] // 8)),
                           generator=rng)
    full = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return {'img_path': str(path), 'ori_shape': size,
            field: {'data': full[:, :size[0], :size[1]]}}


def metric(folder, format='plain', classes=CLASSES, **options):
    result = METRICS.build(dict(
        type='SubmissionMetric', format=format, output_dir=str(folder),
        **options))
    result.dataset_meta = dict(classes=classes)
    return result


def finish(writer, data):
    for one in data:  # several batches
        writer.process({}, [one])
    return writer.evaluate(len(data))


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*')
                  if p.is_file())


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


FOG = 'acdc/rgb_anon/fog/test/GOPR0475/GOPR0475_frame_000041_rgb_anon.png'
NIGHT = 'acdc/rgb_anon/night/test/GOPR0364/GOPR0364_frame_000001_rgb_anon.png'


@pytest.mark.parametrize('format', ['acdc', 'dark_zurich'])
def test_train_ids(tmp_path, format):
    data = [sample(FOG, SIZES[format]), sample(NIGHT, SIZES[format], seed=1)]
    assert finish(metric(tmp_path, format), data) == {}
    names = ['GOPR0364_frame_000001_rgb_anon.png',
             'GOPR0475_frame_000041_rgb_anon.png']
    folders = ['labelTrainIds']
    if format == 'dark_zurich':
        folders = ['confidence', 'labelTrainIds', 'labelTrainIds_invalid']
    inside = [f'{folder}/{name}' for folder in folders for name in names]
    assert files(tmp_path) == [*inside, 'submission.zip']
    # The server looks for exactly one file like this.
    assert len(fnmatch.filter(names, 'GOPR0364_frame_000001*.png')) == 1
    for name, one in zip(reversed(names), data, strict=True):
        expected = one['pred_sem_seg']['data'][0].numpy()
        written = read(tmp_path / 'labelTrainIds' / name)
        assert written.dtype == np.uint8 and written.shape == (1080, 1920)
        assert (written == expected).all()
        assert Image.open(tmp_path / 'labelTrainIds' / name).mode == 'L'
        if format == 'dark_zurich':
            invalid = read(tmp_path / 'labelTrainIds_invalid' / name)
            assert invalid.dtype == np.uint8 and (invalid == expected).all()
            confidence = read(tmp_path / 'confidence' / name)
            assert confidence.dtype == np.uint16
            assert confidence.shape == (1080, 1920)
            assert (confidence == 65535).all()
    with zipfile.ZipFile(tmp_path / 'submission.zip') as archive:
        assert sorted(archive.namelist()) == inside
        assert archive.testzip() is None
        for name in inside:
            assert archive.read(name) == (tmp_path / name).read_bytes()


def test_label_ids(tmp_path):
    image = 'berlin_000000_000019_leftImg8bit.png'
    one = sample(f'leftImg8bit/test/berlin/{image}', SIZES['cityscapes'])
    finish(metric(tmp_path, 'cityscapes'), [one])
    name = f'labelIds/{image}'
    assert files(tmp_path) == [name, 'submission.zip']
    written = read(tmp_path / name)
    assert written.dtype == np.uint8
    predicted = one['pred_sem_seg']['data'][0].numpy()
    assert set(np.unique(predicted)) == set(range(19))
    for index, label in enumerate(CLASSES):
        assert (written[predicted == index] == LABEL_IDS[label]).all()


def test_any_classes_field_and_no_archive(tmp_path):
    one = sample('a/town.jpg', classes=200, field='teacher_pred_sem_seg')
    # A one-channel head gives floats.
    one['teacher_pred_sem_seg']['data'] = (
        one['teacher_pred_sem_seg']['data'].float())
    finish(metric(tmp_path, classes=('a', 'b'), archive=False,
                  field='teacher_pred_sem_seg'), [one])
    assert files(tmp_path) == ['predictions/town.png']
    assert (read(tmp_path / 'predictions' / 'town.png')
            == one['teacher_pred_sem_seg']['data'][0].numpy()).all()


def test_two_images_of_one_name(tmp_path):
    writer = metric(tmp_path)
    writer.process({}, [sample('fog/0.png')])
    with pytest.raises(ValueError, match=r'fog/0.png and .*rain/0.png would '
                       'both be written as 0.png'):
        writer.process({}, [sample('rain/0.png')])


def ranks(monkeypatch, tmp_path, data):
    """Two ranks write; the first gets what both report."""
    results = []
    for rank in range(2):
        monkeypatch.setattr(submission, 'get_rank', lambda rank=rank: rank)
        writer = metric(tmp_path)
        for one in data[rank]:
            writer.process({}, [one])
        results += writer.results
    monkeypatch.setattr(submission, 'get_rank', lambda: 0)
    return metric(tmp_path), results


def test_ranks_meet(tmp_path, monkeypatch):
    # The sampler gives the first image twice, to make the ranks even.
    data = [[sample(f'{i}.png', seed=i) for i in (0, 2)],
            [sample(f'{i}.png', seed=i) for i in (1, 0)]]
    writer, results = ranks(monkeypatch, tmp_path, data)
    assert files(tmp_path) and not (tmp_path / 'predictions').exists()
    writer.compute_metrics(results)
    names = [f'predictions/{i}.png' for i in range(3)]
    assert files(tmp_path) == [*names, 'submission.zip']
    for i, name in enumerate(names):
        expected = sample('', seed=i)['pred_sem_seg']['data'][0].numpy()
        assert (read(tmp_path / name) == expected).all()


def test_names_are_compared_over_ranks(tmp_path, monkeypatch):
    writer, results = ranks(monkeypatch, tmp_path, [
        [sample('fog/0.png')], [sample('rain/0.png')]])
    with pytest.raises(ValueError, match='both be written as 0.png'):
        writer.compute_metrics(results)
    assert not (tmp_path / 'predictions').exists()
    assert not (tmp_path / 'submission.zip').exists()


def test_a_rank_on_another_disk(tmp_path, monkeypatch):
    writer, results = ranks(monkeypatch, tmp_path, [
        [sample('0.png')], [sample('1.png')]])
    (tmp_path / '.partial' / 'rank1' / 'predictions' / '1.png').unlink()
    with pytest.raises(ValueError, match='all machines share'):
        writer.compute_metrics(results)
    assert not (tmp_path / 'predictions').exists()


def write_on_rank(rank, meeting, out):
    torch.distributed.init_process_group(
        'gloo', init_method=meeting.as_uri(), rank=rank, world_size=2)
    data = [sample(f'{i}.png', seed=i) for i in ((0, 2), (1, 0))[rank]]
    writer = metric(out)
    for one in data:
        writer.process({}, [one])
    assert writer.evaluate(3) == {}
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where mmengine's ranks leave their results
    out = tmp_path / 'out'
    # Forked, as a new process would import all of mmseg again.
    processes = torch.multiprocessing.start_processes(
        write_on_rank, (tmp_path / 'meeting', out), nprocs=2, join=False,
        daemon=True, start_method='fork')
    assert any(processes.join(timeout=20) for _ in range(3))
    assert files(out) == [
        *(f'predictions/{i}.png' for i in range(3)), 'submission.zip']
    for i in range(3):
        expected = sample('', seed=i)['pred_sem_seg']['data'][0].numpy()
        assert (read(out / 'predictions' / f'{i}.png') == expected).all()


def test_a_crash_leaves_no_half_set_and_no_trace(tmp_path):
    crashed = metric(tmp_path)
    crashed.process({}, [sample('old.png'), sample('both.png')])
    (tmp_path / '.partial' / 'complete' / 'predictions').mkdir(parents=True)
    assert not (tmp_path / 'predictions').exists()
    finish(metric(tmp_path), [sample('both.png', seed=1)])
    assert files(tmp_path) == ['predictions/both.png', 'submission.zip']
    expected = sample('', seed=1)['pred_sem_seg']['data'][0].numpy()
    assert (read(tmp_path / 'predictions' / 'both.png') == expected).all()
    assert not (tmp_path / '.partial').exists()


@pytest.mark.parametrize('there', ['labelTrainIds', 'submission.zip'])
def test_results_are_never_overwritten(tmp_path, there):
    (tmp_path / there).mkdir()
    with pytest.raises(ValueError, match=f'{there} exists already'):
        metric(tmp_path, 'acdc')
    # one that appeared meanwhile
    (tmp_path / there).rmdir()
    writer = metric(tmp_path, 'acdc')
    writer.process({}, [sample(FOG, SIZES['acdc'])])
    (tmp_path / there).mkdir()
    with pytest.raises(ValueError, match='exists already'):
        writer.evaluate(1)


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    finish(metric(tmp_path), [sample('0.png')])
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


@pytest.mark.parametrize('classes', [
    None, CLASSES[:18], (CLASSES[1], CLASSES[0], *CLASSES[2:])])
def test_classes_are_the_servers(classes):
    writer = SubmissionMetric(format='acdc')
    with pytest.raises(ValueError, match="server_evaluator.format='acdc'"):
        Evaluator([writer]).dataset_meta = dict(classes=classes)


def change(one, **values):
    return {**one, **values}


@pytest.mark.parametrize('format,one,words', [
    ('acdc', sample(FOG, (540, 960)), 'has 960 x 540 pixels, but the server '
     ".*'acdc' takes 1920 x 1080"),
    ('plain', change(sample('a.png'), ori_shape=(10, 14)),
     'prediction of a.png has 7 x 5 pixels, the image 14 x 10'),
    ('acdc', sample(FOG, SIZES['acdc'], classes=30), 'has class 29'),
    ('plain', sample('a.png', (800, 800), classes=300), 'has class 299'),
    ('plain', sample('a.png', field='other'), "no field 'pred_sem_seg'"),
])
def test_predictions_that_the_server_would_refuse(tmp_path, format, one,
                                                  words):
    with pytest.raises(ValueError, match=words):
        metric(tmp_path, format).process({}, [one])


def test_unknown_format_and_missing_folder():
    with pytest.raises(ValueError, match="format is 'dz'; known are acdc"):
        SubmissionMetric(format='dz')
    writer = SubmissionMetric(format='plain')
    with pytest.raises(ValueError, match='--server --out DIR'):
        writer.process({}, [sample('a.png')])


def test_the_key_that_stock_tools_set_with_out_is_known(tmp_path):
    finish(metric(tmp_path, keep_results=True), [sample('a.png')])
    assert files(tmp_path) == ['predictions/a.png', 'submission.zip']
