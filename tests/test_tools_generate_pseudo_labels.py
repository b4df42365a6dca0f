"""Labels that a trained model writes, and a stream that reads them."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS

from helpers import tiny_student
from mmseg_contrast import ops

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / 'tools' / 'generate_pseudo_labels.py'
CLASSES = 3
NAMES = ('road', 'car', 'sky')
SIZE = (24, 32)  # height, width

CONFIG = '''
default_scope = 'mmseg'
data = dict(
    type='BaseSegDataset', data_root={root!r}, img_suffix='.png',
    seg_map_suffix='.png', serialize_data=False,
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    metainfo=dict(classes={names!r}),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='RandomCrop', crop_size=(16, 16)),
              dict(type='PackStreamInputs')])
train_dataloader = dict(dataset=dict(type='StreamDataset', streams=dict(
    source=dict(dataset=data), target=dict(dataset=data, labelled=False))))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 48), keep_ratio=True),
    dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(
    type='RepeatDataset', times=2, dataset=dict(data, pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
        dict(type='PackSegInputs')])))
model = {model!r}
'''


def student():
    config = tiny_student(CLASSES)
    config['data_preprocessor'].pop('size')
    return config


def uda():
    return dict(
        type='UDASegmentor', segmentor=student(),
        teachers=dict(ema=dict(type='EMATeacher')),
        pseudo_labels=dict(target=dict(type='StoredPseudoLabels')),
        views=dict(own=dict(type='PseudoLabelled')),
        objectives=dict(own=dict(type='Segmentation', view='own')))


def trained(path, config=None, seed=0):
    """A model whose predictions differ from place to place, saved."""
    torch.manual_seed(seed)
    model = MODELS.build(uda() if config is None else config)
    nets = [getattr(model, 'segmentor', model)]
    if hasattr(model, 'teachers'):
        nets.append(model.teachers['ema'].model)
    with torch.no_grad():
        for net in nets:
            net.decode_head.conv_seg.weight.normal_(std=2.)
            net.decode_head.conv_seg.bias.zero_()
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return nets


@pytest.fixture
def place(tmp_path):
    """Images in two folders below one root; no label file."""
    random = np.random.default_rng(0)
    for number, folder in enumerate(('a', 'a', 'b')):
        path = tmp_path / 'images' / folder / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cells.repeat(4, 0).repeat(4, 1))
    write_config(tmp_path)
    return tmp_path


def write_config(place, model=None, **changes):
    path = place / 'config.py'
    path.write_text(CONFIG.format(
        root=str(place), names=NAMES, model=uda() if model is None else model)
        + ''.join(f'{key} = {value!r}\n' for key, value in changes.items()))


@pytest.fixture
def tool(place, monkeypatch, capsys):
    """Run the tool in this process; gives its output folder."""
    def run(*options, out='out', checkpoint='net.pth'):
        monkeypatch.setattr(sys, 'argv', [
            'generate_pseudo_labels.py', str(place / 'config.py'),
            str(place / checkpoint), '--out', str(place / out),
            '--workers', '0', '--device', 'cpu', *options])
        runpy.run_path(str(TOOL), run_name='__main__')
        return place / out

    def refuse(*options, **places):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run(*options, **places)
        text = capsys.readouterr().err
        assert text.count('\n') == 2, text  # and where to see more
        return text

    run.refuse = refuse
    return run


def images(place):
    return sorted((place / 'images').rglob('*.png'))


def predicted(net, path, scale=2):
    """Probabilities ``(C, h, w)``, without the tool and mmseg's predict."""
    net.eval()
    image = cv2.resize(cv2.imread(str(path)), None, fx=scale, fy=scale,
                       interpolation=cv2.INTER_LINEAR)
    rgb = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float()
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    with torch.no_grad():
        features = net.backbone((rgb - mean)[None] / std)
        logits = net.decode_head(features)
        logits = F.interpolate(logits, image.shape[:2], mode='bilinear')
        return F.interpolate(logits, SIZE, mode='bilinear')[0].softmax(0)


def manifest_of(out):
    return json.loads((out / 'pseudo_labels.json').read_text())


def test_hard_labels(place, tool, monkeypatch):
    # There is no label file: reading one would be an error.
    net, _ = trained(place / 'net.pth')
    out = tool('--threshold', '0.6')
    files = sorted(out.rglob('*.png'))
    assert [str(one.relative_to(out)) for one in files] == [
        'a/0.png', 'a/1.png', 'b/2.png']
    counts = np.zeros(256, int)
    for path, file in zip(images(place), files, strict=True):
        probs = predicted(net, path)
        confidence, labels = probs.max(0)
        labels = labels.masked_fill(confidence < .6, 255)
        got = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        assert got.dtype == np.uint8
        # Where rounding decides, either is right.
        sure = (confidence - .6).abs() > 1e-4
        assert np.array_equal(got[sure], labels[sure].numpy())
        counts += np.bincount(got.ravel(), minlength=256)
    assert 0 < counts[255] < counts.sum() and (counts[:3] > 0).sum() > 1
    told = manifest_of(out)
    assert told['complete'] and told['kind'] == 'hard'
    assert told['classes'] == list(NAMES) and told['images'] == 3
    assert told['thresholds'] == [.6] * 3
    np.testing.assert_allclose(
        [*told['shares'], told['ignored']],
        counts[[0, 1, 2, 255]] / counts.sum(), atol=1e-6)
    assert not [one for one in out.rglob('.*')]


@pytest.mark.parametrize('rule, portion', [
    ('spcl', None), ('cbst', None), ('cbst', .7)])
def test_thresholds_of_the_whole_set(place, tool, rule, portion):
    net, _ = trained(place / 'net.pth')
    more = [] if portion is None else ['--portion', str(portion)]
    out = tool('--class-thresholds', rule, *more)
    told = manifest_of(out)
    portion = portion or dict(spcl=.5, cbst=.2)[rule]
    assert (told['rule'], told['portion']) == (rule, portion)
    probs = [predicted(net, path) for path in images(place)]
    confidence = torch.stack([one.amax(0) for one in probs])
    labels = torch.stack([one.argmax(0) for one in probs])
    ceiling = .9 if rule == 'spcl' else 1.
    for c in range(CLASSES):
        own = sorted(confidence[labels == c].tolist(), reverse=True)
        assert told['predicted'][c] == pytest.approx(len(own), abs=3)
        want = ceiling
        if own:
            want = min(own[int(np.ceil(portion * len(own))) - 1], ceiling)
        assert told['thresholds'][c] == pytest.approx(want, abs=1e-3)
    kept = 0
    thresholds = torch.tensor(told['thresholds'])
    for one, file in zip(probs, sorted(out.rglob('*.png')), strict=True):
        got = torch.from_numpy(cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                               .astype(np.int64))
        want, _, sure = ops.over_thresholds(
            one[None], thresholds, rule == 'cbst')
        want = want.masked_fill(~sure, 255)[0]
        assert (got == want).float().mean() > .99
        kept += (got != 255).sum()
    if rule == 'spcl':
        assert kept / labels.numel() >= .49


def test_soft_labels(place, tool):
    net, _ = trained(place / 'net.pth')
    out = tool('--policy', 'soft', '--soft-stride', '1')
    coarse = tool('--policy', 'soft', out='coarse')
    for path in images(place):
        name = path.relative_to(place / 'images').with_suffix('.npz')
        want = predicted(net, path)
        with np.load(out / name) as file:
            got = torch.from_numpy(file['probs']).float() / 255
            assert file['size'].tolist() == list(SIZE)
        assert (got - want).abs().max() < 1 / 510 + 1e-3
        with np.load(coarse / name) as file:
            got = torch.from_numpy(file['probs']).float() / 255
        assert (got - F.avg_pool2d(want, 4)).abs().max() < 1 / 510 + 1e-3
    told = manifest_of(out)
    assert told['kind'] == 'soft' and told['ignored'] == 0
    assert sum(told['shares']) == pytest.approx(1, abs=1e-5)
    assert 'thresholds' not in told


def test_the_teacher_labels_too(place, tool):
    _, teacher = trained(place / 'net.pth')
    out = tool('--predict-with', 'teacher', '--threshold', '0')
    for path, file in zip(images(place), sorted(out.rglob('*.png')),
                          strict=True):
        got = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        want = predicted(teacher, path).argmax(0).numpy()
        assert (got == want).mean() > .99
    other = tool('--threshold', '0', out='student')
    assert (other / 'a' / '0.png').read_bytes() != (
        out / 'a' / '0.png').read_bytes()


def test_a_plain_config_is_labelled_too(place, tool):
    net, = trained(place / 'net.pth', student())
    write_config(place, model=student(), test_pipeline=None,
                 train_dataloader=dict(dataset=dict(
                     type='BaseSegDataset', data_root=str(place),
                     img_suffix='.png', serialize_data=False,
                     data_prefix=dict(img_path='images/a'),
                     metainfo=dict(classes=NAMES), pipeline=[])))
    out = tool('--threshold', '0')
    files = sorted(out.rglob('*.png'))
    assert [one.name for one in files] == ['0.png', '1.png']
    # The pipeline of the test data, which has no resize.
    got = cv2.imread(str(files[0]), cv2.IMREAD_UNCHANGED)
    want = predicted(net, images(place)[0], scale=1).argmax(0).numpy()
    assert (got == want).mean() > .99


def test_it_goes_on_where_it_stopped(place, tool):
    trained(place / 'net.pth')
    out = tool('--class-thresholds', 'spcl')
    whole = {one: one.read_bytes() for one in sorted(out.rglob('*.png'))}
    told = manifest_of(out)
    first, second, third = whole
    second.unlink()
    path = out / 'pseudo_labels.json'
    # As it is while the labels are written.
    path.write_text(json.dumps(dict(told, complete=False)))
    for one in (first, third):
        os.utime(one, (1, 1))
    tool('--class-thresholds', 'spcl')
    assert {one: one.read_bytes() for one in whole} == whole
    assert [one.stat().st_mtime == 1 for one in whole] == [True, False, True]
    assert manifest_of(out) == told
    # Nothing of another run is mixed in.
    text = tool.refuse('--class-thresholds', 'cbst')
    assert "out holds labels of another run (portion was 0.5 and is" in text
    trained(place / 'net.pth', seed=1)
    text = tool.refuse('--class-thresholds', 'spcl')
    assert '(checkpoint_sha256 was' in text
    assert 'remove it or choose another --out' in text


def test_an_error_leaves_no_half_file(place, tool):
    trained(place / 'net.pth')
    path = images(place)[1]
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    assert f'cannot read the image {path}' in tool.refuse()
    out = place / 'out'
    assert [one.name for one in out.rglob('*.png')] == ['0.png']
    assert manifest_of(out)['complete'] is False
    path.write_bytes(data)
    tool()
    assert manifest_of(out)['complete'] is True


def test_mistakes_are_one_sentence(place, tool):
    trained(place / 'net.pth')
    refuse = tool.refuse
    assert '--dataloader' in refuse('--dataloader', 'val_dataloader')
    assert "['source', 'target']" in refuse('--stream', 'night')
    assert 'for --policy hard' in refuse(
        '--policy', 'soft', '--threshold', '0.5')
    assert 'not both' in refuse(
        '--threshold', '0.5', '--class-thresholds', 'spcl')
    assert 'must lie in [0, 1]' in refuse('--threshold', '2')
    assert '--portion needs' in refuse('--portion', '0.5')
    assert 'must lie in (0, 1]' in refuse(
        '--class-thresholds', 'cbst', '--portion', '0')
    assert 'at least 1' in refuse('--policy', 'soft', '--soft-stride', '0')
    assert 'no checkpoint' in refuse(checkpoint='none.pth')
    (place / 'bad.pth').write_bytes(b'no')
    assert 'is no checkpoint that torch' in refuse(checkpoint='bad.pth')
    torch.save(dict(state_dict={}), place / 'bad.pth')
    assert 'lacks' in refuse(checkpoint='bad.pth')
    state = torch.load(place / 'net.pth')['state_dict']
    plain = {key: value for key, value in state.items()
             if not key.startswith('teachers')}
    torch.save(dict(state_dict=plain), place / 'plain.pth')
    assert "no weights of the teacher 'ema'" in refuse(
        '--predict-with', 'teacher', checkpoint='plain.pth')
    state['decode_head.conv_seg.weight'] = torch.zeros(4, 8, 1, 1)
    torch.save(dict(state_dict=state), place / 'bad.pth')
    assert 'does not fit the model' in refuse(checkpoint='bad.pth')
    (place / 'full').mkdir()
    (place / 'full' / 'thesis.txt').write_text('mine')
    assert 'is not empty' in refuse(out='full')
    write_config(place, model=student())
    assert 'needs a config of a UDASegmentor' in refuse(
        '--predict-with', 'teacher')
    write_config(place, test_pipeline=None, test_dataloader=None)
    assert 'neither test_pipeline' in refuse()
    write_config(place)
    shutil.copy(images(place)[0], place / 'images' / 'a' / '0.PNG')
    config = (place / 'config.py').read_text().replace(
        "img_suffix='.png'", "img_suffix=('.png', '.PNG')")
    (place / 'config.py').write_text(config)
    if len(list((place / 'images' / 'a').iterdir())) > 2:
        assert 'would both get' in refuse()


def test_what_it_writes_is_what_a_stream_reads(place, tool):
    trained(place / 'net.pth')
    for number, kind in enumerate(('hard', 'soft')):
        out = tool('--policy', kind, out=kind)
        cfg = Config.fromfile(place / 'config.py')
        streams = cfg.train_dataloader.dataset.streams
        streams.target.pseudo_labels = str(out)
        streams.target.dataset.pipeline[2] = dict(
            type='RandomFlip', prob=1.)
        streams.pop('source')
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        sample = dataset[number]['data_samples']['target']
        name = Path(sample.img_path).relative_to(place / 'images')
        assert 'gt_sem_seg' not in sample
        if kind == 'hard':
            want = cv2.imread(str(out / name), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(sample.pseudo_label.data[0].numpy(),
                                  want[:, ::-1])
        else:
            assert sample.pseudo_probs.data.shape == (CLASSES, *SIZE)
            total = sample.pseudo_probs.data.int().sum(0)
            assert (total - 255).abs().max() <= CLASSES
