"""tools/benchmark.py step, of a tiny config. No time is asserted."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from test_models_contrast_head import head_config
from torch import nn

from benchmark_tool import call, columns, step, timing
from benchmark_tool import cut as cutting
from benchmark_tool import pieces as piecewise
from benchmark_tool import training as trainings
from helpers import CLASSES, tiny_student

ROOT = Path(__file__).resolve().parents[1]
PASSES = ['student source', 'student mixed_strong', 'student masked',
          'student target', 'teacher ema source', 'teacher ema target',
          'frozen backbone feature_distance']
PARTS = [
    'preprocessor', 'update of teacher ema',
    'pseudo-labels target (ConfidentFraction)', 'view mixed (ClassMix)',
    'view mixed_strong (StrongAugment)',
    'view target_labelled (PseudoLabelled)', 'view masked (BlockMask)',
    'objective contrast (Contrast)',
    'objective feature_distance (FeatureDistance)',
    'objective source (Segmentation)', 'objective masked (Segmentation)',
    'objective mixed (Segmentation)', 'state shared (PrototypeState)',
    'optimizer']


def stream(size=(32, 32), **options):
    return dict(dataset=dict(type='BaseSegDataset', pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='MarkValidRegion', top=2),
        dict(type='Resize', scale=(80, 64)),
        dict(type='RandomCrop', crop_size=size),
        dict(type='PackStreamInputs')]), **options)


def config(head=None):
    """DAFormer, MIC, contrast from a teacher's bank, and prototypes."""
    student = tiny_student()
    # Files that don't exist are not read.
    student['backbone']['init_cfg'] = dict(
        type='Pretrained', checkpoint='none.pth')
    student['auxiliary_head'] = head or head_config(start=10)
    return dict(
        model=dict(
            type='UDASegmentor', segmentor=student,
            teachers=dict(ema=dict(type='EMATeacher')),
            pseudo_labels=dict(target=dict(
                type='ConfidentFraction', threshold=.999)),
            views=dict(
                mixed=dict(type='ClassMix'),
                mixed_strong=dict(type='StrongAugment', view='mixed'),
                target_labelled=dict(type='PseudoLabelled'),
                masked=dict(
                    type='BlockMask', view='target_labelled', block=8)),
            state=dict(shared=dict(type='PrototypeState', channels=8)),
            objectives=dict(
                source=dict(type='Segmentation', view='source'),
                mixed=dict(type='Segmentation', view='mixed_strong'),
                masked=dict(type='Segmentation', view='masked'),
                feature_distance=dict(
                    type='FeatureDistance', classes=(1, 2), min_ratio=0.),
                contrast=dict(
                    type='Contrast', head='aux', bank_from='teacher'))),
        train_dataloader=dict(
            batch_size=2,
            dataset=dict(type='StreamDataset', streams=dict(
                source=stream(), target=stream(labelled=False)))),
        train_cfg=dict(max_iters=1000),
        optim_wrapper=dict(
            type='OptimWrapper', constructor='UDAOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3),
            clip_grad=dict(max_norm=1.)))


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp('step') / 'tiny.py'
    Config(config()).dump(file)
    return file


def trained(path, **options):
    return trainings.Training(trainings.Setup(str(path), **options))


# ------------------------------------------------------------------- command


def test_the_tables_and_the_file_of_a_step(path, monkeypatch, capsys,
                                           tmp_path):
    file = tmp_path / 'out.json'
    call(monkeypatch, 'step', '--config', path, path, '--turns', 1,
         '--threads', 1, '--clock', 'process', '--no-memory', '--json', file,
         '--cfg-options', 'model.objectives.masked.weight=2.')
    result = json.loads(file.read_text())
    assert result['command'].startswith(
        f'python tools/benchmark.py step --config {path}')
    assert {'python', 'torch', 'mmengine', 'mmcv', 'mmsegmentation',
            'mmseg_contrast'} == set(result['versions'])
    assert (result['device'], result['clock'], result['repeats'],
            result['threads'], result['gpu']) == (
                'cpu', 'process', 1, 1, None)

    row, other = result['steps']
    assert row['crops'] == other['crops'] == dict(
        source=[32, 32], target=[32, 32])
    assert row['images'] == 4 and row['peak'] is None
    assert row['setup']['amp'] == 'float32'
    assert row['setup']['options'] == {'model.objectives.masked.weight': 2.}
    assert sorted(one['name'] for one in row['passes']) == sorted(PASSES)
    assert sorted(one['name'] for one in row['parts']) == sorted(PARTS)

    # With one turn, all that is named adds up to the step.
    def seconds(*rows):
        return sum(one['seconds']['median'] for one in rows)

    whole = seconds(row['step'])
    assert seconds(*row['passes']) == pytest.approx(seconds(row['sum']))
    assert seconds(row['sum'], *row['parts'], row['remainder']) == (
        pytest.approx(whole))
    assert row['ratio']['median'] == pytest.approx(
        whole / seconds(row['sum']))
    assert row['images_per_second'] == pytest.approx(4 / whole)
    share = row['passes'][0]['share']['median']
    assert share == pytest.approx(seconds(row['passes'][0]) / whole)
    assert [one['target'] for one in result['targets']] == [1.1, 1.1]
    assert result['targets'][0]['reached'] == row['ratio']['median']

    lines = [columns(line) for line in capsys.readouterr().out.splitlines()
             if line.startswith('|')]
    assert len(lines) == 2 * (2 + len(PASSES) + 1 + len(PARTS) + 2) + 4
    names = [line[0] for line in lines]
    assert names[2 + len(PASSES)] == '**passes together**'
    flops = [float(line[3]) for line in lines[2:3 + len(PASSES)]]
    assert sum(flops[:-1]) == pytest.approx(flops[-1], abs=.05)


@pytest.mark.parametrize('args, message', [
    (['--config', 'none.py'], '--config none.py: there is no such file'),
    (['--config', 'plain.py'], 'plain.py: a step is that of a UDASegmentor'),
    (['--config', 'tiny.py', '--amp', 'bfloat16'],
     '--amp bfloat16 needs --device cuda'),
    (['--config', 'tiny.py', '--sync-check'],
     '--sync-check needs --device cuda'),
    (['--config', 'tiny.py', '--crop', '0', '8'], 'must be at least 1'),
    (['--config', 'tiny.py', '--cfg-options', 'train_dataloader.dataset.'
      'streams.target.dataset.pipeline=[]'],
     "the pipeline of the stream 'target' says no size"),
])
def test_mistakes_are_named(path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(path.parent)
    Path('plain.py').write_text("model = dict(type='EncoderDecoder')\n")
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, 'step', '--turns', 1, '--no-memory', *args)
    assert message in str(error.value) + capsys.readouterr().err


def test_what_follows_from_the_seconds():
    seconds = {'': [11., 24., 30.], 'student': [8., 16., 20.],
               'teacher': [2., 4., 4.], 'view': [.5, 1., 3.],
               'objective': [3., 5., 4.], '-objective': [2.5, 4., 3.]}
    found = step.summary(seconds, ['student', 'teacher'],
                         ['view', 'objective'],
                         dict(student=2 * 10**9, teacher=10**9), 4)
    assert found['ratio'] == dict(median=1.2, low=1.15, high=1.225)
    assert [one['seconds']['median'] for one in found['parts']] == [1., 1.]
    assert found['remainder']['seconds']['median'] == 2.  # 0, 2, 2
    assert [one['gflop'] for one in found['passes']] == [2., 1.]
    assert found['passes'][1]['share']['median'] == pytest.approx(1 / 6)
    assert found['images_per_second'] == pytest.approx(4 / 24)


def test_nothing_is_measured_in_what_prepares():
    order = []
    timer = timing.Timer('cpu', 2, 'wall')
    timer.in_turns(dict(a=lambda: order.append('a'),
                        b=lambda: order.append('b')),
                   lambda: order.append('-'))
    assert ''.join(order) == '-a-b' * 3


def test_peak_memory_is_that_of_weights_and_steps(path):
    case = dict(setup=dict(config=str(path), crop=[64, 64]))
    assert step.peak_of(case) >= 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('amp', ['float32', 'bfloat16'])
def test_a_step_on_a_gpu(path, monkeypatch, amp, tmp_path):
    file = tmp_path / 'out.json'
    call(monkeypatch, 'step', '--config', path, '--turns', 2, '--no-memory',
         '--device', 'cuda', '--amp', amp, '--json', file, '--sync-check',
         '--cfg-options', 'optim_wrapper.clip_grad=None')
    assert json.loads(file.read_text())['steps'][0]['ratio']['median'] > 0


# ------------------------------------------------------------------ training


def test_training_stands_in_the_middle(path):
    one = trained(path)
    assert one.model.clock.now() == 500
    weights = copy.deepcopy(one.model.segmentor.state_dict())
    before = MessageHub.get_current_instance().get_info('max_iters', None)
    with one.running():
        one.step()
        assert MessageHub.get_current_instance().get_info(
            'max_iters') == 1000
    assert MessageHub.get_current_instance().get_info(
        'max_iters', None) == before
    assert one.model.clock.now() == 501
    moved = {name: (a - weights[name]).abs().max() for name, a in
             one.model.segmentor.named_parameters()}
    assert 0 < moved['decode_head.conv_seg.bias'] < 1e-8  # it was 0
    assert max(moved.values()) < 1e-6


def test_the_networks_are_compiled_on_demand(path, monkeypatch):
    found = []
    monkeypatch.setattr(
        trainings.CompileHook, 'before_train',
        lambda hook, runner: found.append(runner.model))
    begun = []
    monkeypatch.setattr(trainings.torch.compiler, 'cudagraph_mark_step_begin',
                        lambda: begun.append(1))
    one = trained(path, compiled=True,
                  options={'default_hooks.compile.mode': 'reduce-overhead'})
    assert found == [one.model]
    assert one.compile_hook.options['mode'] == 'reduce-overhead'
    with one.running():
        one.step()
    assert len(begun) == 1
    trained(path)
    assert len(found) == 1


def test_the_batch_is_like_the_loaders(path):
    one = trained(path, batch=3)
    images, samples = one.batch['inputs'], one.batch['data_samples']
    assert {name: [tuple(x.shape) for x in stack]
            for name, stack in images.items()} == dict(
        source=[(3, 32, 32)] * 3, target=[(3, 32, 32)] * 3)
    assert images['source'][0].dtype == torch.uint8
    assert 'gt_sem_seg' in samples['source'][0]
    assert 'gt_sem_seg' not in samples['target'][0]
    assert samples['target'][0].valid_region.shape == (32, 32)
    assert samples['target'][0].img_shape == (32, 32)
    assert samples['target'][0].domain == 'target'
    labels = samples['source'][0].gt_sem_seg.data
    assert labels.max() < CLASSES and one.images == 6


@pytest.mark.parametrize('name, sizes', [
    ('daformer/daformer_mit-b0_1xb2-40k_gta2cityscapes-512x512.py',
     dict(source=(512, 512), target=(512, 512))),
    ('sepico/sepico-dist_daformer_mit-b5_1xb2-40k_gta2cityscapes-640x640.py',
     dict(source=(640, 640), target=(640, 1280))),
    ('mic/mic_hrda_mit-b5_1xb2-40k_gta2cityscapes-1024x1024.py',
     dict(source=(1024, 1024), target=(1024, 1024))),
    ('benchmarks/camvid_day2dusk/hrda.py',
     dict(source=(256, 256), target=(256, 256))),
])
def test_sizes_are_those_of_the_pipelines(name, sizes):
    found = trainings.stream_sizes(Config.fromfile(ROOT / 'configs' / name))
    assert found == sizes


def test_other_crops_change_all_sizes_alike():
    cfg = Config.fromfile(
        ROOT / 'configs/mic/'
        'mic_hrda_mit-b5_1xb2-40k_gta2cityscapes-1024x1024.py')
    sizes = trainings.rescale(
        cfg, dict(source=(1024, 1024), target=(1024, 2048)), (256, 512))
    assert sizes == dict(source=(256, 512), target=(256, 1024))
    student = cfg.model.segmentor
    assert tuple(student.detail_size) == (128, 256)
    assert tuple(student.data_preprocessor.size) == (256, 512)
    assert cfg.model.views.masked.block == 16
    assert student.test_cfg.stride == (512, 512)  # testing is not measured


def test_sizes_that_two_places_share_change_once():
    shared = ConfigDict(size=(64, 64))
    cfg = ConfigDict(model=dict(segmentor=dict()))
    dict.__setitem__(cfg, 'data_preprocessor', shared)
    dict.__setitem__(cfg.model.segmentor, 'data_preprocessor', shared)
    trainings.rescale(cfg, dict(source=(64, 64)), (32, 32))
    assert shared.size == (32, 32)


def test_the_optimizer_gets_the_precision_asked_for():
    given = ConfigDict(type='AmpOptimWrapper', loss_scale=512., dtype='x',
                       clip_grad=dict(max_norm=1.))
    assert trainings.optim_config(given, 'float32') == dict(
        type='OptimWrapper', clip_grad=dict(max_norm=1.))
    half = trainings.optim_config(given, 'float16')
    assert (half['type'], half['dtype'], half['loss_scale']) == (
        'AmpOptimWrapper', 'float16', 'dynamic')
    assert trainings.optim_config(given, 'bfloat16')['loss_scale'] == dict(
        enabled=False)


# -------------------------------------------------------------------- pieces


def test_a_tensor_met_twice_becomes_one_leaf():
    @dataclass
    class Both:
        maps: list
        name: str

    weight = torch.ones(2, requires_grad=True)
    maps, other = weight * 2, torch.zeros(2)
    known = {}
    found = cutting.cut(
        dict(a=Both([maps, other], 'x'), b=(maps, None)), known=known)
    leaf = found['a'].maps[0]
    assert found['b'][0] is leaf and leaf is not maps
    assert leaf.is_leaf and leaf.requires_grad
    assert leaf.data_ptr() == maps.data_ptr()
    assert not found['a'].maps[1].requires_grad
    assert found['a'].name == 'x' and found['b'][1] is None
    assert len(known) == 2
    assert not cutting.cut(maps, recording=False).requires_grad


@pytest.fixture(scope='module')
def pieces(path):
    one = trained(path)
    with one.running():
        one.step()
        yield piecewise.Pieces(one)


def gradients(model):
    return {name: None if one.grad is None else one.grad.clone()
            for name, one in model.segmentor.named_parameters()}


def test_a_students_pass_has_the_stock_loss(pieces):
    passes, model = pieces.passes(), pieces.model
    pieces.prepare()
    passes['student mixed_strong']()
    found = gradients(model)
    pieces.prepare()
    view = pieces.kept.views['mixed_strong']
    logits = nn.functional.interpolate(
        model.segmentor.decode_head(model.segmentor.backbone(view.images)),
        (32, 32), mode='bilinear')
    nn.functional.cross_entropy(logits, view.labels, ignore_index=255,
                                reduction='none').mean().backward()
    for name, want in gradients(model).items():
        if want is None:
            assert found[name] is None, name
        else:
            assert torch.allclose(found[name], want, atol=1e-6), name
    # Contrast asked for no logits of the target, only for features.
    pieces.prepare()
    passes['student target']()
    found = gradients(model)
    assert found['backbone.layers.1.0.weight'].abs().sum() > 0
    assert found['decode_head.conv_seg.weight'] is None


def test_what_each_pass_runs(pieces):
    runs = []
    model = pieces.model
    encoder = model.objectives['feature_distance'].encoder
    hooks = [net.layers[0].register_forward_hook(
        lambda *_, name=name: runs.append(name)) for name, net in (
            ('student', model.segmentor.backbone), ('frozen', encoder),
            ('teacher', model.teachers['ema'].model.backbone))]
    for name, one in pieces.passes().items():
        pieces.prepare()
        runs.clear()
        one()
        assert runs == [name.split()[0]], name
    # What is left needs no backbone: not even the feature distance does.
    parts = pieces.parts()
    runs.clear()
    for name, part in parts.items():
        for run in (part.run, part.beyond):
            if run is not None:
                pieces.prepare()
                run()
                assert runs == [], name
    assert model.objectives['feature_distance'].encoder is encoder
    for hook in hooks:
        hook.remove()


def test_flops_are_those_of_the_forward(pieces):
    # Two images; convolutions 3 to 8, then 8 to 8 channels, both halving.
    backbone = 2 * 2 * 9 * 8 * (3 * 16**2 + 8 * 8**2)
    found = {name: one.flops() for name, one in pieces.passes().items()}
    assert found['frozen backbone feature_distance'] == backbone
    assert found['student target'] == backbone
    # A view by itself, also where the step sees several in one pass.
    views = list(pieces.students)
    pieces.model.joint_views = tuple(views)
    try:
        again = {name: one.flops() for name, one in pieces.passes().items()}
    finally:
        pieces.model.joint_views = ()
    assert len(views) > 1 and again == found
    decode = 2 * 2 * 8 * 8**2 * (9 * 8 + CLASSES)
    assert found['student source'] == backbone + decode
    assert found['teacher ema target'] == backbone + decode


def test_parts_do_what_the_step_does(pieces):
    model, parts = pieces.model, pieces.parts()
    kept = pieces.kept
    pieces.prepare()
    objective = parts['objective contrast (Contrast)']
    objective.run()
    assert objective.beyond is None
    # Into what the pass gave, and no further.
    assert any(leaf.grad is not None for leaf in pieces.leaves)
    head = model.segmentor.auxiliary_head
    assert all(one.grad is not None for one in head.projection.parameters())
    assert all(one.grad is None
               for one in model.segmentor.backbone.parameters())
    pieces.prepare()
    assert all(leaf.grad is None for leaf in pieces.leaves)

    segmentation = parts['objective mixed (Segmentation)']
    segmentation.run()
    weighted = [leaf.grad for leaf in pieces.leaves if leaf.grad is not None]
    pieces.prepare()
    segmentation.beyond()
    plain = [leaf.grad for leaf in pieces.leaves if leaf.grad is not None]
    assert len(weighted) == len(plain) == 1
    assert weighted[0].shape == (2, CLASSES, 8, 8)
    ratio = weighted[0].norm() / plain[0].norm()
    assert 0 < ratio < .9  # no pixel of the target weighs

    # Made anew, and the same: the draws are those of the position.
    again = pieces.again(views={name: view for name, view in
                                kept.views.items() if name != 'mixed_strong'})
    again.iteration = 501  # when the step was kept
    assert torch.equal(again.view('mixed_strong').images,
                       kept.views['mixed_strong'].images)
    assert set(kept.views) == {
        'source', 'target', 'mixed', 'mixed_strong', 'target_labelled',
        'masked'}
    assert kept.students == {}


def test_draws_follow_the_steps(pieces):
    before = pieces.model.clock.now()
    pieces.training.step()
    pieces.prepare()
    assert pieces.model.clock.now() == before + 1
    assert pieces.kept.iteration == before


def test_the_optimizer_is_a_part(pieces):
    parts, model = pieces.parts(), pieces.model
    weight = model.segmentor.decode_head.conv_seg.weight
    before = weight.detach().clone()
    state = pieces.training.optim_wrapper.optimizer.state[weight]
    count = int(state['step'])
    parts['optimizer'].run()
    assert int(state['step']) == count + 1
    assert not torch.equal(weight, before) and weight.grad is None
    assert len(pieces.gradients) == len(pieces.training.parameters)


def test_what_waits_is_found_on_a_batch_that_is_there(pieces, monkeypatch):
    training, seen = pieces.training, []
    host = training.batch
    monkeypatch.setattr(
        step, 'forbid_waiting',
        lambda functions: seen.extend((functions, training.batch)))
    step.check_syncs(training)
    assert seen[0] == [training.step] and training.batch is host
    assert seen[1] is not host and set(seen[1]) == set(host)
