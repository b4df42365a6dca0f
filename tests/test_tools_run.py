"""Training, resuming and testing through the tools, on four tiny images."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_contrast.environment import allow_checkpoint_classes

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'

CONFIG = '''
_base_ = [{base!r}]
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend='gloo'))
dataset = dict(
    type='BaseSegDataset',
    data_root={data!r},
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png',
    metainfo=dict(classes=('dark', 'bright'), palette=[[0] * 3, [255] * 3]),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs')
    ])
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dataset)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dataset)
test_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU']),
    dict(type='IoUMetric', iou_metrics=['mIoU'], prefix='teacher'),
]
test_cfg = dict(type='TestLoop')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=1))
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='UDAOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.1))
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[0.] * 3,
        std=[255.] * 3,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(16, 16)),
    backbone=dict(
        type='UNet',
        in_channels=3,
        base_channels=4,
        num_stages=2,
        strides=(1, 1),
        enc_num_convs=(1, 1),
        dec_num_convs=(1, ),
        downsamples=(True, ),
        enc_dilations=(1, 1),
        dec_dilations=(1, ),
        norm_cfg=dict(type='BN')),
    decode_head=dict(
        type='FCNHead',
        in_channels=4,
        in_index=1,
        channels=4,
        num_convs=0,
        concat_input=False,
        num_classes=2,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
'''


@pytest.fixture
def config(tmp_path):
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        label = np.zeros((16, 16), np.uint8)
        label[:, 4 + 2 * number:] = 1
        image = label[..., None] * 150 + random.integers(
            0, 100, (16, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'images' / f'{number}.png'), image)
        cv2.imwrite(str(tmp_path / 'labels' / f'{number}.png'), label)
    path = tmp_path / 'tiny.py'
    base = ROOT / 'configs' / '_base_' / 'default_runtime.py'
    path.write_text(CONFIG.format(base=str(base), data=str(tmp_path)))
    return path


@pytest.fixture
def run(run_tool):
    """Run one of our tools."""
    return lambda tool, *arguments: run_tool(TOOLS / tool, *arguments)


def scalars(work_dir):
    """What was logged under a work dir, one dict a line."""
    return [
        json.loads(line)
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]


def results_of(work_dir):
    """The results that a test run left."""
    path, = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


def test_train_resume_and_test(config, run, tmp_path):
    run('train.py', config, '--cfg-options', 'randomness.seed=0')
    work_dir = tmp_path / 'work_dirs' / 'tiny'
    allow_checkpoint_classes()
    saved = torch.load(work_dir / 'iter_2.pth', weights_only=True)
    assert saved['meta']['iter'] == 2
    assert saved['meta']['seed'] == 0
    # Two groups of equal settings became one.
    assert len(saved['optimizer']['param_groups']) == 1

    run('train.py', config, '--work-dir', work_dir, '--resume',
        '--cfg-options', 'train_cfg.max_iters=3')
    assert [line['step'] for line in scalars(work_dir)] == [1, 2, 3]

    out = tmp_path / 'my out'
    run('test.py', config, work_dir / 'iter_3.pth', '--work-dir',
        tmp_path / 'tested', '--out', out, '--show-dir', 'painted',
        '--cfg-options', 'default_hooks.visualization.interval=1')
    names = [f'{number}.png' for number in range(4)]
    # Two metrics: the second would otherwise overwrite the first's files.
    assert sorted(p.name for p in out.iterdir()) == [*names, 'teacher']
    assert sorted(p.name for p in (out / 'teacher').iterdir()) == names
    result = results_of(tmp_path / 'tested')
    assert 0 < result['mIoU'] <= 100
    assert result['teacher/mIoU'] == result['mIoU']
    assert len(list((tmp_path / 'painted').rglob('test_*.png'))) == 4

    run('test.py', config, work_dir / 'iter_3.pth', '--work-dir',
        tmp_path / 'tta', '--tta')
    used = Config.fromfile(tmp_path / 'tta' / 'tiny.py')
    assert used.model.type == 'UDATTAModel'
    assert used.model.module.type == 'EncoderDecoder'
    assert used.test_dataloader.dataset.pipeline[1].type == 'TestTimeAug'
    assert 0 < results_of(tmp_path / 'tta')['mIoU'] <= 100


@pytest.mark.parametrize('kind', ['EncoderDecoder', 'UDASegmentor'])
def test_windows_in_batches(server, config, run, tmp_path, kind,
                            monkeypatch):
    where = 'model.test_cfg'
    if kind == 'UDASegmentor':
        where = 'model.segmentor.test_cfg'
        config.write_text(config.read_text() + """
model = dict(
    type='UDASegmentor',
    segmentor=model,
    objectives=dict(source=dict(type='Segmentation', view='source')))
""")
    passes = []
    stock = EncoderDecoder.encode_decode
    monkeypatch.setattr(
        EncoderDecoder, 'encode_decode', lambda self, inputs, metas: (
            passes.append(tuple(inputs.shape[::2])),
            stock(self, inputs, metas))[1])
    results = {}
    for batched, tta in ((None, False), (4, False), (4, True), (None, True)):
        passes.clear()
        work_dir = tmp_path / f'{batched}{tta}'
        run('test.py', config, tmp_path / 'net.pth', '--work-dir', work_dir,
            '--cfg-options', f'{where}.mode=slide',
            f'{where}.crop_size=8,8', f'{where}.stride=4,4',
            f'{where}.batched={batched}', *(['--tta'] if tta else []))
        results[batched, tta] = results_of(work_dir)['mIoU']
        # 9 windows in each of 4 images; the smallest of 5 scales has 1
        if not tta:
            assert passes == [(3, 8)] * 12 if batched else [(1, 8)] * 36
        else:
            assert max(passes) == ((4, 8) if batched else (1, 8))
    assert results[4, False] == results[None, False]
    assert results[4, True] == results[None, True]


def test_validation_while_training_in_batches(config, run, tmp_path,
                                              monkeypatch):
    """A stock segmentor, with an average of its weights that has a copy."""
    config.write_text(config.read_text() + '''
val_dataloader = test_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
val_cfg = dict(type='ValLoop')
custom_hooks = [dict(type='EMAHook')]
''')
    passes = []
    stock = EncoderDecoder.encode_decode
    monkeypatch.setattr(
        EncoderDecoder, 'encode_decode', lambda self, inputs, metas: (
            passes.append(tuple(inputs.shape[::2])),
            stock(self, inputs, metas))[1])
    weights, results = [], []
    for batched in (None, 4):
        passes.clear()
        work_dir = tmp_path / f'{batched}'
        run('train.py', config, '--work-dir', work_dir, '--cfg-options',
            'randomness.seed=0', 'train_cfg.val_interval=1',
            'model.test_cfg.mode=slide', 'model.test_cfg.crop_size=8,8',
            'model.test_cfg.stride=4,4', f'model.test_cfg.batched={batched}')
        # 9 windows in each of 4 images, validated twice
        assert passes == [(3, 8)] * 24 if batched else [(1, 8)] * 72
        saved = torch.load(work_dir / 'iter_2.pth', weights_only=False)
        assert 'ema_state_dict' in saved
        weights.append(saved['state_dict'])
        results.append([line['mIoU'] for line in scalars(work_dir)
                        if 'mIoU' in line])
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key
    assert len(results[0]) == 2 and results[0] == results[1]


def test_windows_that_cannot_be_stop_training_at_once(config, run, tmp_path):
    with pytest.raises(SystemExit):
        run('train.py', config, '--cfg-options', 'model.test_cfg.mode=slide',
            'model.test_cfg.crop_size=8,8', 'model.test_cfg.stride=9,9',
            'model.test_cfg.batched=4')
    assert not list(tmp_path.rglob('*.pth'))


SERVER = '''
_base_ = ['tiny.py']
image = dict(
    type='BaseSegDataset',
    data_root={data!r},
    img_suffix='.png',
    metainfo=dict(classes=('dark', 'bright'), palette=[[0] * 3, [255] * 3]),
    # As for val: what loads labels is taken out.
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(16, 16)),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs')
    ])
server_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(image, data_prefix=dict(img_path='fog')),
            dict(image, data_prefix=dict(img_path='rain')),
        ]))
server_evaluator = dict(type='SubmissionMetric', format='plain')
'''


@pytest.fixture
def server(config, tmp_path):
    """Test images of two folders without labels."""
    random = np.random.default_rng(1)
    for folder, number in (('fog', 0), ('rain', 1), ('rain', 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        image = random.integers(0, 256, (32, 24, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / folder / f'{number}.png'), image)
    path = tmp_path / 'server.py'
    path.write_text(SERVER.format(data=str(tmp_path)))
    torch.manual_seed(0)
    cfg = Config.fromfile(config)
    torch.save(
        dict(state_dict=MODELS.build(cfg.model).state_dict()),
        tmp_path / 'net.pth')
    return path


def expected(config, weights, image):
    """Prediction of the net for one image, without tools and metrics."""
    cfg = Config.fromfile(config)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(weights)['state_dict'])
    bgr = cv2.resize(cv2.imread(str(image)), (16, 16))
    inputs = torch.from_numpy(bgr).permute(2, 0, 1)
    sample = SegDataSample(metainfo=dict(
        img_shape=(16, 16), ori_shape=(32, 24), flip=False))
    with torch.no_grad():
        done, = model.test_step(dict(inputs=[inputs], data_samples=[sample]))
    return done.pred_sem_seg.data[0].numpy()


@pytest.mark.parametrize('tta', [False, True])
def test_server_split_without_labels(server, config, run, tmp_path, tta):
    out = tmp_path / 'upload'
    # The visualization meets images without labels too.
    run('test.py', server, tmp_path / 'net.pth', '--server', '--out', out,
        '--work-dir', tmp_path / 'work', '--show-dir', 'painted',
        *(['--tta'] if tta else []))
    names = [f'predictions/{number}.png' for number in range(3)]
    assert sorted(str(p.relative_to(out)) for p in out.rglob('*.*')) == [
        *names, 'submission.zip']
    seen = set()
    for folder, name in zip(('fog', 'rain', 'rain'), names, strict=True):
        written = cv2.imread(str(out / name), cv2.IMREAD_UNCHANGED)
        assert written.shape == (32, 24) and written.dtype == np.uint8
        seen |= set(np.unique(written))
        if not tta:
            assert (written == expected(
                config, tmp_path / 'net.pth',
                tmp_path / folder / Path(name).name)).all()
    assert seen == {0, 1}
    assert len(list((tmp_path / 'painted').rglob('test_*.png'))) == 3
    used = Config.fromfile(tmp_path / 'work' / 'server.py')
    assert (used.model.type == 'UDATTAModel') == tta
    # val's evaluator is another one and stays out of it
    assert used.test_evaluator.type == 'SubmissionMetric'


def test_server_needs_a_split_and_a_folder(server, config, run, capsys):
    with pytest.raises(SystemExit):
        run('test.py', server, 'x.pth', '--server')
    assert 'error: --server needs --out' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('test.py', config, 'x.pth', '--server', '--out', 'upload')
    assert ('error: --server needs server_dataloader in the config'
            in capsys.readouterr().err)
    with pytest.raises(SystemExit):
        run('test.py', server, 'x.pth', '--server', '--out', 'upload',
            '--cfg-options', 'server_evaluator=None')
    assert 'needs server_evaluator in the config' in capsys.readouterr().err
    # a checkpoint that isn't there was looked for by none of these
    assert not Path('upload').exists()


def test_pipelines_without_labels():
    without = runpy.run_path(str(TOOLS / 'test.py'))['without_labels']
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackSegInputs')
    labels = dict(type='LoadAnnotations', reduce_zero_label=True)
    flips = [dict(type='RandomFlip', prob=p) for p in (0., 1.)]
    pipeline = [load, dict(type='TestTimeAug', transforms=[
        flips, [labels], [pack]])]
    # Of an empty list of choices TestTimeAug would make no copy at all.
    assert without(pipeline) == [load, dict(
        type='TestTimeAug', transforms=[flips, [pack]])]
    assert pipeline[1]['transforms'][1] == [labels]  # unchanged
    unknown = dict(type='FromElsewhere')
    assert without([load, dict(type=LoadAnnotations), unknown, labels]) == [
        load, unknown]


def test_amp_exchanges_the_wrapper():
    enable_amp = runpy.run_path(str(TOOLS / 'train.py'))['enable_amp']
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', clip_grad=1)))
    for _ in range(2):  # the second time it is one already
        enable_amp(cfg)
        assert cfg.optim_wrapper == dict(
            type='AmpOptimWrapper', clip_grad=1, loss_scale='dynamic')


def test_flags_that_do_not_fit_the_config(config, run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run('train.py', config, '--amp', '--cfg-options',
            'optim_wrapper.type=Other')
    assert 'error: --amp works with' in capsys.readouterr().err
    tool = runpy.run_path(str(TOOLS / 'test.py'))
    cfg = Config.fromfile(config)
    with pytest.raises(ValueError, match='--out needs a metric with'):
        tool['save_predictions']([ConfigDict(type='DumpResults')], 'out')
    cfg.pop('tta_pipeline')
    with pytest.raises(ValueError, match='--tta needs tta_pipeline'):
        tool['enable_tta'](cfg)
    cfg.default_hooks.pop('visualization')
    with pytest.raises(ValueError, match='default_hooks.visualization'):
        tool['enable_visualization'](cfg, True, None, 0.)


def test_single_metric_and_wrapped_dataset():
    tool = runpy.run_path(str(TOOLS / 'test.py'))
    cfg = Config(
        dict(
            test_evaluator=dict(type='CityscapesMetric'),
            test_dataloader=dict(
                dataset=dict(dataset=dict(pipeline=['old']))),
            model=dict(type='M'),
            tta_model=dict(type='T'),
            tta_pipeline=['new']))
    tool['save_predictions'](cfg.test_evaluator, 'out')
    assert cfg.test_evaluator == dict(
        type='CityscapesMetric', output_dir='out', keep_results=True)
    tool['enable_tta'](cfg)
    assert cfg.test_dataloader.dataset.dataset.pipeline == ['new']
    assert cfg.model == dict(type='T', module=dict(type='M'))


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'publish.py'])
def test_missing_stack_is_said_before_anything_else(tool, tmp_path):
    # A package folder without contents hides the installed one.
    (tmp_path / 'mmengine').mkdir()
    (tmp_path / 'mmengine' / '__init__.py').write_text(
        "raise ModuleNotFoundError('gone', name='mmengine')")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, str(TOOLS / tool), 'x.py'],
                          env=env,
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(
        'ImportError: mmseg_contrast needs a working OpenMMLab stack, but '
        'mmengine is missing')


def test_get_flops_counts_the_student(tmp_path, run, capsys):
    path = tmp_path / 'uda.py'
    path.write_text('''
custom_imports = dict(imports=['mmseg_contrast'])
model = dict(
    type='UDASegmentor',
    segmentor=dict(
        type='EncoderDecoder',
        backbone=dict(
            type='UNet', in_channels=3, base_channels=4, num_stages=2,
            strides=(1, 1), enc_num_convs=(1, 1), dec_num_convs=(1, ),
            downsamples=(True, ), enc_dilations=(1, 1), dec_dilations=(1, ),
            norm_cfg=dict(type='SyncBN')),
        decode_head=dict(
            type='FCNHead', in_channels=4, in_index=1, channels=4,
            num_convs=0, concat_input=False, num_classes=2, dropout_ratio=0),
        auxiliary_head=dict(
            type='FCNHead', in_channels=8, in_index=0, channels=64,
            num_classes=2)))
''')
    run('get_flops.py', path, '--shape', '8', '16')
    out = capsys.readouterr().out
    assert 'Input: 8 x 16' in out
    # Weights by hand: 3x3 convolutions 3-4, 4-8, (4+4)-4; 1x1 8-4 and the
    # classifier 4-2 with bias; a scale and a shift for every normalisation.
    weights = 27 * 4 + 36 * 8 + 72 * 4 + 8 * 4 + (4 * 2 + 2)
    norms = 2 * (4 + 8 + 4 + 4)
    assert f'Parameters: {(weights + norms) / 1e6:.3f} M' in out

    tool = runpy.run_path(str(TOOLS / 'get_flops.py'))
    model = Config.fromfile(path).model
    result = tool['count'](model, 8, 16)
    assert result['params'] == weights + norms
    # Multiply-adds: the convolutions on 8 x 16, the second on 4 x 8 pixels.
    pixels = 8 * 16
    convolutions = pixels * (27 * 4 + 36 * 8 / 4 + 72 * 4 + 4 * 2)
    assert result['flops'] == pytest.approx(convolutions, rel=0.5)
    assert result['flops'] >= convolutions
