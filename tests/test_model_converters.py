import argparse
import io
import pickle
import runpy
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import addict
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from mmseg.utils import cityscapes_classes, cityscapes_palette

from helpers import dacs_parts
from mmseg_contrast.models import ReferenceMixVisionTransformer
from mmseg_contrast.models.legacy import (
    convert_backbone,
    convert_student,
    fit,
    mit_shape,
    read_weights,
    table,
    take_part,
    write_weights,
)
from mmseg_contrast.models.legacy.mit import mit_key

TOOLS = Path(__file__).resolve().parents[1] / 'tools' / 'model_converters'
DAFORMER, MIT = TOOLS / 'daformer2mmseg.py', TOOLS / 'mit2mmseg.py'

CHANNELS, DEPTHS = (8, 16, 40, 64), (1, 2, 1, 1)
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)
CLASSES = 6


# The published names and shapes, written out.


def published_mit(channels=CHANNELS, depths=DEPTHS, classifier=False,
                  make=torch.randn):
    state, before = OrderedDict(), 3

    def add(name, *shape):
        state[f'{name}.weight'] = make(*shape)
        state[f'{name}.bias'] = make(shape[0])

    for s, (wide, depth, ratio) in enumerate(
            zip(channels, depths, REDUCTIONS, strict=False), 1):
        kernel = 7 if s == 1 else 3
        add(f'patch_embed{s}.proj', wide, before, kernel, kernel)
        add(f'patch_embed{s}.norm', wide)
        for j in range(depth):
            add(f'block{s}.{j}.norm1', wide)
            add(f'block{s}.{j}.attn.q', wide, wide)
            add(f'block{s}.{j}.attn.kv', 2 * wide, wide)
            add(f'block{s}.{j}.attn.proj', wide, wide)
            if ratio > 1:
                add(f'block{s}.{j}.attn.sr', wide, wide, ratio, ratio)
                add(f'block{s}.{j}.attn.norm', wide)
            add(f'block{s}.{j}.norm2', wide)
            add(f'block{s}.{j}.mlp.fc1', 4 * wide, wide)
            add(f'block{s}.{j}.mlp.dwconv.dwconv', 4 * wide, 1, 3, 3)
            add(f'block{s}.{j}.mlp.fc2', wide, 4 * wide)
        add(f'norm{s}', wide)
        before = wide
    if classifier:
        add('head', 1000, before)
    return state


def published_head(channels=16, classes=CLASSES):
    state = OrderedDict()

    def conv(name, *shape):
        state[f'{name}.conv.weight'] = torch.randn(*shape)
        for key in ('weight', 'bias', 'running_mean', 'running_var'):
            state[f'{name}.bn.{key}'] = torch.rand(shape[0])
        state[f'{name}.bn.num_batches_tracked'] = torch.tensor(7)

    for i, wide in enumerate(CHANNELS):
        state[f'embed_layers.{i}.proj.weight'] = torch.randn(channels, wide)
        state[f'embed_layers.{i}.proj.bias'] = torch.randn(channels)
    conv('fuse_layer.aspp_modules.0', channels, 4 * channels, 1, 1)
    for i in (1, 2, 3):
        name = f'fuse_layer.aspp_modules.{i}'
        conv(f'{name}.depthwise_conv', 4 * channels, 1, 3, 3)
        conv(f'{name}.pointwise_conv', channels, 4 * channels, 1, 1)
    conv('fuse_layer.bottleneck', channels, 4 * channels, 3, 3)
    state['conv_seg.weight'] = torch.randn(classes, channels, 1, 1)
    state['conv_seg.bias'] = torch.randn(classes)
    return state


def published_student(seed, classes=CLASSES):
    torch.manual_seed(seed)
    return OrderedDict(
        [(f'backbone.{k}', v) for k, v in published_mit().items()] +
        [(f'decode_head.{k}', v)
         for k, v in published_head(classes=classes).items()])


def prefixed(prefix, state):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def published_features(state, images):
    """The published network, from its equations; a list of four stages."""

    def norm(tokens, name, eps):
        return F.layer_norm(tokens, tokens.shape[-1:],
                            state[f'{name}.weight'], state[f'{name}.bias'],
                            eps)

    def linear(tokens, name):
        return tokens @ state[f'{name}.weight'].T + state[f'{name}.bias']

    def conv(maps, name, **options):
        return F.conv2d(maps, state[f'{name}.weight'], state[f'{name}.bias'],
                        **options)

    def tokens_of(maps):
        return maps.flatten(2).transpose(1, 2)

    def maps_of(tokens, size):
        return tokens.transpose(1, 2).unflatten(2, size)

    def attention(x, size, name, heads, ratio):
        memory = x
        if ratio > 1:
            memory = tokens_of(conv(maps_of(x, size), f'{name}.sr',
                                    stride=ratio))
            memory = norm(memory, f'{name}.norm', 1e-5)
        query = linear(x, f'{name}.q')
        key, value = linear(memory, f'{name}.kv').chunk(2, -1)
        wide = x.shape[-1] // heads
        outputs = []
        for h in range(heads):
            own = slice(h * wide, (h + 1) * wide)
            scores = query[..., own] @ key[..., own].transpose(1, 2)
            outputs.append(
                (scores / wide**0.5).softmax(-1) @ value[..., own])
        return linear(torch.cat(outputs, -1), f'{name}.proj')

    features, maps = [], images
    for s, (depth, heads, ratio) in enumerate(
            zip(DEPTHS, HEADS, REDUCTIONS, strict=True), 1):
        maps = conv(maps, f'patch_embed{s}.proj', stride=4 if s == 1 else 2,
                    padding=3 if s == 1 else 1)
        size = maps.shape[2:]
        x = norm(tokens_of(maps), f'patch_embed{s}.norm', 1e-5)
        for j in range(depth):
            name = f'block{s}.{j}'
            x = x + attention(norm(x, f'{name}.norm1', 1e-6), size,
                              f'{name}.attn', heads, ratio)
            hidden = linear(norm(x, f'{name}.norm2', 1e-6), f'{name}.mlp.fc1')
            hidden = conv(maps_of(hidden, size), f'{name}.mlp.dwconv.dwconv',
                          padding=1, groups=hidden.shape[-1])
            x = x + linear(F.gelu(tokens_of(hidden)), f'{name}.mlp.fc2')
        maps = maps_of(norm(x, f'norm{s}', 1e-6), size)
        features.append(maps)
    return features


# Configs of the same network, and the tools.


def student_config(classes=CLASSES, **backbone):
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
        backbone=dict(dict(
            type='ReferenceMixVisionTransformer', embed_dims=8,
            num_layers=list(DEPTHS), num_heads=list(HEADS)), **backbone),
        decode_head=dict(
            type='DAFormerHead', in_channels=list(CHANNELS), channels=16,
            embed_dims=16, num_classes=classes),
        train_cfg=dict(), test_cfg=dict(mode='whole'))


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path / 'plain.py', student_config())


def write_config(path, model):
    path.write_text(f"default_scope = 'mmseg'\nmodel = {model!r}\n")
    return str(path)


def run_tool(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, args)])
    runpy.run_path(str(tool), run_name='__main__')


def refused(monkeypatch, capsys, tool, *args):
    """The error message of a run that must write nothing."""
    folder = Path(args[1]).parent
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    with pytest.raises(SystemExit) as exit_:
        run_tool(monkeypatch, tool, *args)
    assert exit_.value.code == 1
    assert before == {p: p.read_bytes() for p in folder.rglob('*')
                      if p.is_file()}
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'Traceback' not in err
    return err.removeprefix('error: ')


def old_meta():
    """What mmcv 1.x writes beside the weights, with all its types."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=np.float64(6e-5))
    weight.sum().backward()
    optimizer.step()
    return dict(
        meta=dict(
            mmcv_version='1.3.7', mmseg_version='0.16.0', iter=40000,
            epoch=0, seed=np.int64(0), CLASSES=tuple('abcdef'),
            PALETTE=[[i, i, i] for i in range(CLASSES)],
            hook_msgs=dict(best_score=np.float64(0.6885),
                           last_ckpt='iter_40000.pth')),
        optimizer=optimizer.state_dict())


def save_old(path, monkeypatch, **checkpoint):
    """As torch before 1.6 and numpy before 2 saved it, with mmcv's dicts."""

    class ConfigDict(addict.Dict):
        pass

    ConfigDict.__module__, ConfigDict.__qualname__ = (
        'mmcv.utils.config', 'ConfigDict')
    fake = types.ModuleType('mmcv.utils.config')
    fake.ConfigDict = ConfigDict
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'mmcv.utils.config', fake)
        checkpoint['args'] = argparse.Namespace(lr=0.1)
        checkpoint['cfg'] = ConfigDict(model=dict(type='DACS'))
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data[:2] != b'PK' and b'mmcv.utils.config\nConfigDict' in data
    path.write_bytes(data.replace(b'cnumpy._core.multiarray',
                                  b'cnumpy.core.multiarray'))


@pytest.fixture
def mic_file(tmp_path, monkeypatch):
    """Student, teacher and ImageNet model in one old file."""
    path = tmp_path / 'iter_40000.pth'
    state = OrderedDict()
    for prefix, seed in (('model.', 0), ('ema_model.', 1),
                         ('imnet_model.', 2),
                         ('mic.teacher.ema_model.', 3)):
        state.update(prefixed(prefix, published_student(seed)))
    save_old(path, monkeypatch, state_dict=state, **old_meta())
    return path


# The mapping


def test_features_are_those_of_the_published_network():
    torch.manual_seed(0)
    published = {key: value.double() * (0.3 if value.ndim > 1 else 1)
                 for key, value in published_mit().items()}
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    backbone = ReferenceMixVisionTransformer(
        embed_dims=8, num_layers=DEPTHS).double().eval()
    backbone.load_state_dict(convert_backbone(published).weights, strict=True)
    with torch.no_grad():
        features = backbone(images)
    expected = published_features(published, images)
    assert [f.shape[1:] for f in features] == [
        (8, 16, 16), (16, 8, 8), (40, 4, 4), (64, 2, 2)]
    for mine, its in zip(features, expected, strict=True):
        assert its.abs().mean() > 0.1
        assert (mine - its).abs().max() < 1e-11


def test_queries_then_keys_then_values():
    published = published_mit()
    weights = convert_backbone(published).weights
    for kind, shape in (('weight', (40, 40)), ('bias', (40, ))):
        query = published[f'block3.0.attn.q.{kind}']
        key, value = published[f'block3.0.attn.kv.{kind}'].chunk(2)
        assert query.shape == key.shape == shape
        joined = weights[f'layers.2.1.0.attn.attn.in_proj_{kind}']
        assert torch.equal(joined[:40], query)
        assert torch.equal(joined[40:80], key)
        assert torch.equal(joined[80:], value)


def test_nothing_is_lost_or_used_twice():
    published = published_student(0)
    converted = convert_student(published)
    used = [key for keys in converted.sources.values() for key in keys]
    assert sorted(used) == sorted(published)
    assert converted.published_mit
    for name, value in converted.weights.items():
        parts = [published[key].flatten() for key in converted.sources[name]]
        assert torch.equal(value.flatten(), torch.cat(parts))
    model = MODELS.build(student_config()).state_dict()
    result = fit(converted, model)
    result.check('file', 'model')
    assert list(result.placed) == list(model)
    assert result.unplaced == ()


@pytest.mark.parametrize('published, mine', [
    ('patch_embed4.proj.bias', 'layers.3.0.projection.bias'),
    ('patch_embed1.norm.weight', 'layers.0.0.norm.weight'),
    ('block3.39.norm1.bias', 'layers.2.1.39.norm1.bias'),
    ('block3.39.norm2.bias', 'layers.2.1.39.norm2.bias'),
    ('block1.0.attn.norm.weight', 'layers.0.1.0.attn.norm.weight'),
    ('block1.0.attn.sr.weight', 'layers.0.1.0.attn.sr.weight'),
    ('block1.0.attn.proj.bias', 'layers.0.1.0.attn.attn.out_proj.bias'),
    ('block2.1.mlp.fc1.bias', 'layers.1.1.1.ffn.layers.0.bias'),
    ('block2.1.mlp.fc2.bias', 'layers.1.1.1.ffn.layers.4.bias'),
    ('norm2.weight', 'layers.1.2.weight'),
    ('head.weight', None),
    ('block1.0.attn.rel_pos.weight', None),
    ('xnorm1.weight', None),
])
def test_names(published, mine):
    assert mit_key(published) == mine


def test_other_networks_keep_their_names():
    # DeepLabV2 on a ResNet, HRDA's heads, SePiCo's projection.
    student = MODELS.build(dict(
        type='EncoderDecoder',
        backbone=dict(type='ResNetV1c', depth=18, num_stages=4,
                      out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN')),
        decode_head=dict(type='DLV2Head', in_channels=512, num_classes=4)))
    state = student.state_dict()
    assert 'backbone.stem.0.weight' in state
    assert 'decode_head.aspp_modules.0.conv.weight' in state
    converted = convert_student(state)
    assert not converted.published_mit
    assert list(fit(converted, state).placed) == list(state)

    heads = ('decode_head.head.conv_seg.weight',
             'decode_head.head.embed_layers.0.proj.weight',
             'decode_head.scale_attention.fuse_layer.conv.weight',
             'auxiliary_head.convs.0.conv.weight')
    both = {**prefixed('backbone.', published_mit()),
            **{key: torch.ones(1) for key in heads}}
    assert set(heads) <= set(convert_student(both).weights)


def test_a_student_of_hrda(tmp_path, monkeypatch, capsys):
    """Head and attention keep their names; the result loads strictly."""
    plain = published_student(3)
    student = OrderedDict(
        (key.replace('decode_head.', 'decode_head.head.'), value)
        for key, value in plain.items())
    embedding = [key for key in plain if '.embed_layers.' in key]
    student.update((key.replace('decode_head.', 'decode_head.scale_attention.'
                                ), torch.rand_like(plain[key]))
                   for key in embedding)
    attention = 'decode_head.scale_attention.'
    student[f'{attention}fuse_layer.conv.weight'] = torch.randn(16, 64, 1, 1)
    for key in ('weight', 'bias', 'running_mean', 'running_var'):
        student[f'{attention}fuse_layer.bn.{key}'] = torch.rand(16)
    student[f'{attention}fuse_layer.bn.num_batches_tracked'] = torch.tensor(7)
    student[f'{attention}conv_seg.weight'] = torch.randn(CLASSES, 16, 1, 1)
    student[f'{attention}conv_seg.bias'] = torch.randn(CLASSES)
    model = student_config()
    model.update(
        type='HRDASegmentor', detail_size=(64, 64), decode_head=dict(
            type='HRDAHead', head=model['decode_head'],
            attention=dict(channels=16, embed_dims=16)))
    config = write_config(tmp_path / 'hrda.py', model)
    source, target = tmp_path / 'hrda.pth', tmp_path / 'new.pth'
    save_old(source, monkeypatch, state_dict=prefixed('model.', student))
    run_tool(monkeypatch, DAFORMER, source, target, '--config', config)
    assert 'All keys of the file are placed.' in capsys.readouterr().out
    net = MODELS.build(Config.fromfile(config).model)
    net.load_state_dict(torch.load(target, weights_only=True)['state_dict'],
                        strict=True)
    for key in (f'{attention}fuse_layer.conv.weight',
                'decode_head.head.conv_seg.weight'):
        assert torch.equal(net.state_dict()[key], student[key])


def test_half_an_attention_is_refused():
    state = published_mit()
    del state['block2.1.attn.kv.bias']
    with pytest.raises(ValueError, match=r'has block2\.1\.attn\.q\.bias but '
                                         r'no block2\.1\.attn\.kv\.bias'):
        convert_backbone(state)
    state = published_mit()
    state['block2.1.attn.kv.weight'] = torch.ones(16, 16)
    with pytest.raises(ValueError, match=r'q\.weight is \(16, 16\) and .*'
                                         r'kv\.weight is \(16, 16\)'):
        convert_backbone(state)


# daformer2mmseg.py


@pytest.mark.parametrize('part, seed', [('student', 0), ('teacher', 1)])
def test_each_part_of_an_old_file(mic_file, config, tmp_path, monkeypatch,
                                  capsys, part, seed):
    target = tmp_path / 'new' / f'{part}.pth'
    run_tool(monkeypatch, DAFORMER, mic_file, target, '--config', config,
             '--part', part)
    out, err = capsys.readouterr()
    assert err == ''
    keys, (own, other) = len(published_student(0)), {
        'student': ('model', 'ema_model'),
        'teacher': ('ema_model', 'model')}[part]
    assert f'{part}: {keys} of {4 * keys} keys' in out
    rows = [line.split(maxsplit=2) for line in out.splitlines()
            if line.startswith('  ')][1:]
    assert {name: (count, why) for name, count, why in rows} == {
        other: (str(keys), 'another model (--part '
                f'{"teacher" if part == "student" else "student"})'),
        'imnet_model': (str(keys), 'another model (--part imnet)'),
        'mic.teacher.ema_model': (str(keys),
                                  'another model (--part teacher)')}

    # Any torch loads it safely, into the plain student, strictly.
    checkpoint = torch.load(target, weights_only=True)
    assert checkpoint['meta'] == dict(
        legacy=dict(file='iter_40000.pth', part=part, prefix=f'{own}.',
                    iter=40000),
        dataset_meta=dict(classes=list('abcdef'),
                          palette=[[i, i, i] for i in range(CLASSES)]))
    student = MODELS.build(Config.fromfile(config).model)
    student.load_state_dict(checkpoint['state_dict'], strict=True)
    published = published_student(seed)
    assert torch.equal(
        student.decode_head.fuse_layer.bottleneck.bn.running_mean,
        published['decode_head.fuse_layer.bottleneck.bn.running_mean'])
    assert torch.equal(
        student.backbone.layers[1][1][1].ffn.layers[0].weight[..., 0, 0],
        published['backbone.block2.1.mlp.fc1.weight'])
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    # As readable as any file, although it was a temporary one.
    assert target.stat().st_mode == Path(config).stat().st_mode


def test_imagenet_backbone_is_what_init_cfg_loads(
        mic_file, config, tmp_path, monkeypatch, capsys):
    target = tmp_path / 'imnet.pth'
    run_tool(monkeypatch, DAFORMER, mic_file, target, '--config', config,
             '--part', 'imnet')
    out = capsys.readouterr().out
    assert 'imnet_model.decode_head' in out and 'not the backbone' in out
    assert 'model.backbone in' in out
    backbone = MODELS.build(dict(
        student_config()['backbone'],
        init_cfg=dict(type='Pretrained', checkpoint=str(target))))
    backbone.init_weights()
    weights = convert_student(published_student(2)).weights
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[f'backbone.{name}']), name
    assert 'dataset_meta' not in torch.load(target)['meta']


def test_config_of_ours_and_its_teachers(mic_file, tmp_path, monkeypatch,
                                         capsys):
    ours = dict(type='UDASegmentor', segmentor=student_config(),
                **dacs_parts())
    config = write_config(tmp_path / 'uda.py', ours)
    target = tmp_path / 'student.pth'
    run_tool(monkeypatch, DAFORMER, mic_file, target, '--config', config)
    assert 'keys of model.segmentor in' in capsys.readouterr().out

    model = MODELS.build(Config.fromfile(config).model)
    load_checkpoint(model, str(target), strict=True)
    expected = convert_student(published_student(0)).weights
    teacher = model.teachers['ema'].model.state_dict()
    for name, value in model.segmentor.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(teacher[name], expected[name]), name


def test_prefixes_are_prefixes():
    one, two = torch.ones(1), torch.zeros(1)
    state = {'ema_model.backbone.model.x': one, 'model.backbone.x': two,
             'imnet_model.backbone.x': one}
    taken, prefix = take_part(state, 'student')
    assert (list(taken), prefix) == (['backbone.x'], 'model.')
    assert taken['backbone.x'] is two
    taken, prefix = take_part(state, 'teacher')
    assert (list(taken), prefix) == (['backbone.model.x'], 'ema_model.')

    # MIC has two teachers; that of the masked images is used if it is alone.
    mic = {'mic.teacher.ema_model.backbone.x': one, 'model.backbone.x': two}
    assert take_part(mic, 'teacher') == (
        {'backbone.x': one}, 'mic.teacher.ema_model.')
    both = {**mic, 'ema_model.backbone.x': two}
    assert take_part(both, 'teacher')[0]['backbone.x'] is two

    # A plain student, even beside another model.
    plain = {'backbone.x': two, 'decode_head.y': two, 'imnet_model.z': one}
    assert take_part(plain, 'student') == (
        {'backbone.x': two, 'decode_head.y': two}, '')
    rows = table(plain, '', ['decode_head.y']).splitlines()[2:]
    assert [row.split(maxsplit=2) for row in rows] == [
        ['imnet_model', '1', 'another model (--part imnet)'],
        ['decode_head.y', '1', 'the model has no such key'],
        ['Names', 'that', 'the model has not:'], ['decode_head.y']]
    with pytest.raises(ValueError, match=r'no teacher \(ema_model\. or .*'
                       r'begin with backbone \(1\), decode_head \(1\), '
                       r'imnet_model \(1\)\.'):
        take_part(plain, 'teacher')
    with pytest.raises(ValueError, match='no student'):
        take_part({'discriminator.x': one}, 'student')


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.model.'])
def test_other_layouts_of_the_student(config, tmp_path, monkeypatch, capsys,
                                      prefix):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    state = prefixed(prefix, published_student(4))
    torch.save(state if prefix else dict(state_dict=state), source)
    run_tool(monkeypatch, DAFORMER, source, target, '--config', config)
    assert 'All keys of the file are placed.' in capsys.readouterr().out
    weights = torch.load(target)['state_dict']
    expected = convert_student(published_student(4)).weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_keys_without_a_place_are_reported(config, tmp_path, monkeypatch,
                                           capsys):
    source, target = tmp_path / 'sepico.pth', tmp_path / 'b.pth'
    state = prefixed('model.', published_student(0))
    for i in (0, 1):
        state[f'model.auxiliary_head.convs.{i}.conv.weight'] = torch.ones(1)
        state[f'model.auxiliary_head.convs.{i}.conv.bias'] = torch.ones(1)
    state['model.backbone.head.weight'] = torch.ones(2, 2)
    state['discriminator.weight'] = torch.ones(1)
    torch.save(dict(state_dict=state), source)
    run_tool(monkeypatch, DAFORMER, source, target, '--config', config)
    rows = [line.split(maxsplit=2)
            for line in capsys.readouterr().out.splitlines()]
    nowhere = 'the model has no such key'
    assert ['model.auxiliary_head.convs', '4', nowhere] in rows
    assert ['model.backbone.head', '1', nowhere] in rows
    assert ['discriminator', '1', 'no part of a model'] in rows
    # Each of that part by its name.
    for i in range(2):
        for kind in ('weight', 'bias'):
            assert [f'model.auxiliary_head.convs.{i}.conv.{kind}'] in rows
    assert ['model.backbone.head.weight'] in rows
    assert not any('head' in key and 'decode' not in key
                   for key in torch.load(target)['state_dict'])


def test_missing_keys_are_named_and_nothing_is_written(
        config, tmp_path, monkeypatch, capsys):
    source = tmp_path / 'a.pth'
    state = prefixed('model.', published_student(0))
    del state['model.backbone.norm3.bias'], state['model.decode_head.conv_seg'
                                                  '.weight']
    torch.save(dict(state_dict=state), source)
    error = refused(monkeypatch, capsys, DAFORMER, source, tmp_path / 'b.pth',
                    '--config', config)
    assert error.splitlines()[:-1] == [
        f'{source} lacks 2 key(s) of model in {config}:',
        '  backbone.layers.2.2.bias', '  decode_head.conv_seg.weight']


def test_another_number_of_classes_names_both_shapes(
        config, tmp_path, monkeypatch, capsys):
    source = tmp_path / 'a.pth'
    torch.save(dict(state_dict=published_student(0, classes=19)), source)
    error = refused(monkeypatch, capsys, DAFORMER, source, tmp_path / 'b.pth',
                    '--config', config)
    assert error.splitlines()[:-1] == [
        f'{source} has 2 tensor(s) of another shape than model in {config}:',
        '  decode_head.conv_seg.weight: (19, 16, 1, 1) in the file, '
        '(6, 16, 1, 1) in the model',
        '  decode_head.conv_seg.bias: (19,) in the file, (6,) in the model',
        f'{source} may have other classes: see decode_head.num_classes.']


def test_only_what_fits_is_placed():
    state = dict(a=torch.ones(1), b=torch.ones(2), c=torch.ones(3))
    result = fit(convert_student(state), dict(
        b=torch.ones(3), c=torch.zeros(3), d=torch.ones(1)))
    assert result.placed == dict(c=state['c'])
    assert result.unplaced == ('a', )
    assert result.missing == ('d', )
    assert result.wrong_shape == dict(b=((2, ), (3, )))


def test_existing_files_stay(config, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(dict(state_dict=published_student(0)), source)
    target.write_text('mine')
    args = (source, target, '--config', config)
    assert f'{target} exists: give --force' in refused(
        monkeypatch, capsys, DAFORMER, *args)
    run_tool(monkeypatch, DAFORMER, *args, '--force')
    assert 'state_dict' in torch.load(target)
    assert 'is what is to be converted' in refused(
        monkeypatch, capsys, DAFORMER, source, source, '--config', config,
        '--force')
    assert 'is a folder' in refused(
        monkeypatch, capsys, DAFORMER, source, tmp_path, '--config', config,
        '--force')


def test_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / 'b.pth'
    target.write_text('mine')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        write_weights(target, dict(x=torch.ones(1)), {})
    assert [p.read_text() for p in tmp_path.iterdir()] == ['mine']


def test_nineteen_classes_are_those_of_cityscapes():
    dataset_meta = runpy.run_path(str(DAFORMER))['dataset_meta']
    assert dataset_meta({}, 19) == dict(
        classes=cityscapes_classes(), palette=cityscapes_palette())
    assert dataset_meta({}, 7) == {}
    old = dict(CLASSES=('a', 'b'), PALETTE=np.array([[1, 2, 3], [4, 5, 6]]))
    assert dataset_meta(old, 2) == dict(
        classes=['a', 'b'], palette=[[1, 2, 3], [4, 5, 6]])
    assert dataset_meta(old, 19)['classes'] == cityscapes_classes()


def test_stock_backbone_is_warned_of(tmp_path, monkeypatch, capsys):
    source = tmp_path / 'a.pth'
    torch.save(dict(state_dict=published_student(0)), source)
    config = write_config(tmp_path / 'uda.py', dict(
        type='UDASegmentor',
        segmentor=student_config(type='MixVisionTransformer')))
    run_tool(monkeypatch, DAFORMER, source, tmp_path / 'b.pth', '--config',
             config)
    assert capsys.readouterr().err.startswith(
        'warning: set model.segmentor.backbone.type = '
        "'ReferenceMixVisionTransformer' in ")


def test_nothing_is_downloaded(tmp_path):
    model = dict(student_config(
        init_cfg=dict(type='Pretrained', checkpoint='http://no.where/a.pth')))
    model['pretrained'] = 'http://no.where/b.pth'
    config = write_config(tmp_path / 'c.py', model)
    build_student = runpy.run_path(str(DAFORMER))['build_student']
    student, where = build_student(config)
    assert where == 'model' and student.backbone.init_cfg is None


def test_config_without_a_segmentor(tmp_path, monkeypatch, capsys):
    source = tmp_path / 'a.pth'
    torch.save(dict(state_dict=published_student(0)), source)
    config = write_config(tmp_path / 'c.py', dict(type='Nothing'))
    assert f'{config} has no model.backbone' in refused(
        monkeypatch, capsys, DAFORMER, source, tmp_path / 'b.pth', '--config',
        config)


# Files


class Evil:
    def __reduce__(self):
        return print, ('executed', )


def test_code_in_a_file_is_named_and_not_run(tmp_path, capsys):
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=published_mit(), extra=Evil()), path)
    with pytest.raises(ValueError, match=r'evil\.pth contains print, which '
                       'torch does not read safely. If you trust it'):
        read_weights(path)
    assert capsys.readouterr().out == ''


def test_the_rescue_that_is_named_works(tmp_path, monkeypatch):
    torch.save(dict(state_dict=published_mit(), extra=Evil()),
               tmp_path / 'evil.pth')
    with pytest.raises(ValueError) as info:
        read_weights(tmp_path / 'evil.pth')
    command = str(info.value).split('weights alone: ')[1].removesuffix('.')
    monkeypatch.chdir(tmp_path)
    exec(command, dict(torch=torch))
    weights, meta = read_weights(tmp_path / 'weights_of_evil.pth')
    assert weights.keys() == published_mit().keys() and meta == {}


def test_reading_leaves_the_allow_list_as_it_was(mic_file, tmp_path):
    weights, meta = read_weights(mic_file)
    assert meta['hook_msgs']['best_score'] == 0.6885
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_weights(mic_file)
    assert before == set(map(str, torch.serialization.get_safe_globals()))
    assert any('HistoryBuffer' in name for name in before)
    path = tmp_path / 'args.pth'
    torch.save(argparse.Namespace(a=1), path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_parameters_become_plain_tensors(tmp_path):
    torch.save(dict(x=torch.nn.Parameter(torch.ones(1))), tmp_path / 'a.pth')
    assert not read_weights(tmp_path / 'a.pth')[0]['x'].requires_grad


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='There is no checkpoint'):
        read_weights(tmp_path / 'missing.pth')

    text = tmp_path / 'text.pth'
    text.write_text('hello')
    with pytest.raises(ValueError, match=r'text\.pth is no checkpoint'):
        read_weights(text)

    cut = tmp_path / 'cut.pth'
    torch.save(published_mit(), cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r'cut\.pth is no checkpoint'):
        read_weights(cut)

    for name, content in (('tensor', torch.ones(1)), ('empty', {}),
                          ('state', dict(state_dict={}))):
        torch.save(content, tmp_path / f'{name}.pth')
        with pytest.raises(ValueError, match=f'{name}.pth holds no weights'):
            read_weights(tmp_path / f'{name}.pth')

    torch.save(dict(epoch=3), tmp_path / 'epoch.pth')
    with pytest.raises(ValueError, match="'epoch' is of the type int"):
        read_weights(tmp_path / 'epoch.pth')


def test_packed_downloads_and_the_oldest_format(tmp_path):
    packed = tmp_path / 'daformer.zip'
    with zipfile.ZipFile(packed, 'w') as archive:
        archive.writestr('run/iter_40000_relevant.pth', 'x')
    with pytest.raises(ValueError, match=r'is an archive: unpack it .* '
                                         r'\(run/iter_40000_relevant\.pth\)'):
        read_weights(packed)

    def tar(name, members):
        with tarfile.open(tmp_path / name, 'w:gz') as archive:
            for member in members:
                info = tarfile.TarInfo(member)
                info.size = 1
                archive.addfile(info, io.BytesIO(b'x'))
        return tmp_path / name

    with pytest.raises(ValueError, match=r'unpack it .* \(run/latest\.pth\)'):
        read_weights(tar('hrda.tar.gz', ['run/latest.pth', 'run/cfg.json']))
    with pytest.raises(ValueError, match='format of torch 0.1'):
        read_weights(tar('old.pth', ['storages', 'tensors', 'pickle']))


# mit2mmseg.py


@pytest.mark.parametrize('name, depths, channels', [
    ('mit_b0', (2, 2, 2, 2), (32, 64, 160, 256)),
    ('mit_b1', (2, 2, 2, 2), (64, 128, 320, 512)),
    ('mit_b2', (3, 4, 6, 3), (64, 128, 320, 512)),
    ('mit_b3', (3, 4, 18, 3), (64, 128, 320, 512)),
    ('mit_b4', (3, 8, 27, 3), (64, 128, 320, 512)),
    ('mit_b5', (3, 6, 40, 3), (64, 128, 320, 512)),
])
def test_variants(name, depths, channels):
    state = published_mit(
        channels, depths,
        make=lambda *shape: torch.empty(shape, device='meta'))
    shape = mit_shape(state)
    assert shape.variant == name
    assert shape.config() == dict(
        in_channels=3, embed_dims=channels[0], num_layers=depths,
        num_heads=(1, 2, 5, 8), patch_sizes=(7, 3, 3, 3),
        strides=(4, 2, 2, 2), sr_ratios=(8, 4, 2, 1),
        out_indices=(0, 1, 2, 3), mlp_ratio=4, qkv_bias=True)


def test_released_weights_become_what_init_cfg_loads(
        tmp_path, monkeypatch, capsys):
    source, target = tmp_path / 'mit_b0.pth', tmp_path / 'out.pth'
    published = published_mit((32, 64, 160, 256), (2, 2, 2, 2),
                              classifier=True)
    torch.save(published, source, _use_new_zipfile_serialization=False)
    run_tool(monkeypatch, MIT, source, target)
    out, err = capsys.readouterr()
    assert err == ''
    assert f'{source} is mit_b0: channels (32, 64, 160, 256)' in out
    assert ['head.weight', '1', 'the', 'model'] in [
        line.split()[:4] for line in out.splitlines()]

    # The config that is printed is the one that loads it.
    shown = out[out.index('backbone=dict('):].removeprefix('backbone=')
    settings = eval(shown)
    assert settings['embed_dims'] == 32
    assert settings['num_layers'] == (2, 2, 2, 2)
    backbone = MODELS.build(settings)
    backbone.init_weights()
    expected = convert_backbone(published).weights
    state = backbone.state_dict()
    assert state.keys() == expected.keys() - {'head.weight', 'head.bias'}
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_unknown_variant_is_converted_and_said(tmp_path, monkeypatch,
                                               capsys):
    source, target = tmp_path / 'mit.pth', tmp_path / 'out.pth'
    torch.save(dict(model=published_mit(), epoch=300), source)
    run_tool(monkeypatch, MIT, source, target)
    out, err = capsys.readouterr()
    assert 'no published variant: channels (8, 16, 40, 64), blocks ' \
        '(1, 2, 1, 1)' in out
    assert err == ('warning: the number of heads is in no file; (1, 2, 5, 8) '
                   'are assumed.\n')
    backbone = ReferenceMixVisionTransformer(embed_dims=8, num_layers=DEPTHS)
    backbone.load_state_dict(torch.load(target)['state_dict'], strict=True)


def test_another_number_of_stages(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / 'mit.pth', tmp_path / 'out.pth'
    torch.save(published_mit(CHANNELS[:3], DEPTHS[:3]), source)
    run_tool(monkeypatch, MIT, source, target)
    out = capsys.readouterr().out
    settings = eval(out[out.index('backbone='):].removeprefix('backbone='))
    assert settings['patch_sizes'] == (7, 3, 3)
    assert settings['sr_ratios'] == (8, 4, 2)
    assert settings['out_indices'] == (0, 1, 2)
    assert 'mlp_ratio' not in settings
    MODELS.build(settings).load_state_dict(
        torch.load(target)['state_dict'], strict=True)


@pytest.mark.parametrize('drop, message', [
    ('patch_embed1', 'it has the stages [2, 3, 4]'),
    ('block2.0', 'stage 2 has the blocks [1]'),
    ('block4', 'stage 4 has the blocks []'),
    ('patch_embed', 'there is no patch_embed1.proj.weight'),
    ('block1.0.mlp.fc1.weight', 'it has no block1.0.mlp.fc1.weight'),
    ('block2.1.norm1.bias', 'lacks 1 key(s) of the backbone that its stages '
     'say (no published variant):\n  layers.1.1.1.norm1.bias'),
    ('block2.1.attn.q.bias', 'has block2.1.attn.kv.bias but no '
     'block2.1.attn.q.bias'),
])
def test_incomplete_stages_are_refused(tmp_path, monkeypatch, capsys, drop,
                                       message):
    source = tmp_path / 'mit.pth'
    torch.save({key: value for key, value in published_mit().items()
                if not key.startswith(drop)}, source)
    error = refused(monkeypatch, capsys, MIT, source, tmp_path / 'out.pth')
    assert str(source) in error and message in error


def test_stages_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / 'mit.pth', tmp_path / 'out.pth'
    state = published_mit()
    state['block3.0.attn.proj.weight'] = torch.ones(8, 8)
    torch.save(state, source)
    assert ('layers.2.1.0.attn.attn.out_proj.weight: (8, 8) in the file, '
            '(40, 40) in the model\n') in refused(
                monkeypatch, capsys, MIT, source, target)
    state = published_mit()
    state['block3.0.mlp.fc1.weight'] = torch.ones(80, 40)
    torch.save(state, source)
    assert 'mlp ratios [4.0, 4.0, 2.0, 4.0]' in refused(
        monkeypatch, capsys, MIT, source, target)


def test_mit_target_is_not_overwritten(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / 'mit.pth', tmp_path / 'out.pth'
    torch.save(published_mit(), source)
    target.write_text('mine')
    assert 'give --force' in refused(monkeypatch, capsys, MIT, source, target)
    run_tool(monkeypatch, MIT, source, target, '--force')
    assert len(torch.load(target)['state_dict']) == len(
        ReferenceMixVisionTransformer(
            embed_dims=8, num_layers=DEPTHS).state_dict())
