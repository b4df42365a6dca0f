"""Whole runs through mmengine: resume, stock tools, two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mmseg
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STOCK_TOOLS = Path(mmseg.__file__).parent / '.mim' / 'tools'
CONFIG = 'configs/quickstart/uda.py'
# A smaller world: few images, a few iterations, dropout as it is.
SMALL = [
    'train_dataloader.dataset.streams.source.dataset.num_images=12',
    'train_dataloader.dataset.streams.target.dataset.num_images=10',
    'test_dataloader.dataset.num_images=4',
    'val_dataloader.dataset.num_images=4',
    'train_dataloader.batch_size=2',
    'model.pseudo_labels.target.threshold=0.11',
    'default_hooks.logger.interval=1', 'log_processor.window_size=1',
    'randomness.seed=3',
]


def tool(script, *args, options=(), env=None, launcher=()):
    """Run a tool as its user does."""
    command = [sys.executable, *launcher, str(script), *map(str, args)]
    if options:
        command += ['--cfg-options', *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT),
                 **(env or {})))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def scalars(work_dir):
    """Logged training scalars by iteration, over all starts of a run."""
    rows = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if 'source.decode.loss_ce' in row:
                rows[row['step']] = row
    return rows


def train_options(iterations, workers=0, interval=3):
    return [
        *SMALL, f'train_cfg.max_iters={iterations}',
        'train_cfg.val_interval=100',
        f'train_dataloader.num_workers={workers}',
        f'train_dataloader.persistent_workers={workers > 0}',
        f'default_hooks.checkpoint.interval={interval}',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False']


def test_resume_continues_exactly(tmp_path):
    """Losses, weights and teachers of 3 + 3 iterations equal those of 6."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    tool('tools/train.py', CONFIG, '--work-dir', whole,
         options=train_options(6, workers=1))
    # Stopped after 3 of 6 iterations; other workers than the whole run.
    tool('tools/train.py', CONFIG, '--work-dir', parts,
         options=train_options(3, workers=2))
    tool('tools/train.py', CONFIG, '--work-dir', parts, '--resume',
         options=train_options(6, workers=2))
    one, two = scalars(whole), scalars(parts)
    assert sorted(one) == sorted(two) == [1, 2, 3, 4, 5, 6]
    for step in (4, 5, 6):
        for key in one[step]:
            if 'loss' in key or key.startswith(('target.', 'ema.', 'mixed')):
                assert one[step][key] == two[step][key], (step, key)
    first = torch.load(whole / 'iter_6.pth', weights_only=True)['state_dict']
    second = torch.load(parts / 'iter_6.pth', weights_only=True)['state_dict']
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key


def test_stock_tools_run_our_configs(tmp_path):
    options = train_options(2, interval=2)
    tool(STOCK_TOOLS / 'train.py', CONFIG, '--work-dir', tmp_path,
         options=options)
    both = []
    for script in (STOCK_TOOLS / 'test.py', ROOT / 'tools' / 'test.py'):
        out = tmp_path / script.parent.parent.name
        tool(script, CONFIG, tmp_path / 'iter_2.pth', '--work-dir', out,
             options=[*SMALL, 'test_dataloader.num_workers=0',
                      'test_dataloader.persistent_workers=False'])
        result = json.loads(next(out.glob('*/*.json')).read_text())
        both.append(result['mIoU'])
    assert both[0] == both[1]
    # Test-time augmentation, by student and teacher.
    out = tmp_path / 'tta'
    tool('tools/test.py', CONFIG, tmp_path / 'iter_2.pth', '--work-dir', out,
         '--tta', options=[
             *SMALL, 'test_dataloader.num_workers=0',
             'test_dataloader.persistent_workers=False',
             'test_dataloader.dataset.num_images=2',
             'model.predict_with=both',
             'test_evaluator.field=teacher_pred_sem_seg',
             'test_evaluator.prefix=teacher'])
    result = json.loads(next(out.glob('*/*.json')).read_text())
    assert 0 <= result['teacher/mIoU'] <= 100


RANKS = '''
import sys
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.runner import Runner
import mmseg_contrast

# mmengine's own start insists on a GPU.
torch.distributed.init_process_group('gloo')
cfg = Config.fromfile(sys.argv[1])
cfg.merge_from_dict(eval(sys.argv[3]))
cfg.launcher = 'pytorch'
cfg.model_wrapper_cfg = dict(
    type='MMDistributedDataParallel', broadcast_buffers=False,
    device_ids=None)
cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
cfg.work_dir = sys.argv[2]
cfg.default_hooks.checkpoint.interval = 100
runner = Runner.from_cfg(cfg)
runner.model.module.keep_step = True
runner.train()
model = runner.model.module
step = model.last_step
torch.save(dict(
    state={k: v for k, v in model.state_dict().items()},
    origin=step.view('mixed').extras['origin'],
    source=step.view('source').images,
    q=step.pseudo_labels['target'].parts[0][0],
    confidence=step.pseudo_labels['target'].confidence,
), f'{sys.argv[2]}/rank{get_rank()}.pth')
'''


def test_two_ranks_agree_on_weights_and_differ_in_draws(tmp_path):
    script = tmp_path / 'ranks.py'
    script.write_text(RANKS)
    options = {}
    for option in train_options(5):
        key, value = option.split('=', 1)
        try:
            options[key] = eval(value)
        except NameError:
            options[key] = value
    options['custom_hooks'] = [dict(type='PositionHook'),
                               dict(type='NormSyncHook')]
    tool(script, CONFIG, tmp_path, repr(options), launcher=(
        '-m', 'torch.distributed.run', '--nproc_per_node=2',
        '--standalone'))
    one, two = (torch.load(tmp_path / f'rank{r}.pth', weights_only=True)
                for r in range(2))
    # Student, teacher, and (after NormSyncHook) batch-norm statistics.
    for key, value in one['state'].items():
        assert torch.equal(two['state'][key], value), key
    assert not torch.equal(one['source'], two['source'])
    assert not torch.equal(one['origin'], two['origin'])
    # The pseudo-labels' weight is the mean over both ranks.
    shares = [(rank['confidence'] >= 0.11).float().mean()
              for rank in (one, two)]
    assert shares[0] != shares[1]
    assert one['q'] == two['q']
    torch.testing.assert_close(one['q'], (shares[0] + shares[1]) / 2)


MISSING = 'train_dataloader.dataset.streams.target.dataset'


@pytest.mark.parametrize('options,words', [
    (['train_dataloader.sampler.type=InfiniteSampler'],
     ['train_dataloader.sampler']),
    (['model.decode_head.num_classes=3'], ['model.segmentor.decode_head']),
    (['model.segmentor.decode_head.num_classes=3'],
     ['model.segmentor.decode_head.num_classes = 3', 'are 10']),
    ([f'{MISSING}._delete_=True', f'{MISSING}.type=BaseSegDataset',
      f'{MISSING}.data_prefix.img_path=no/such/folder',
      f'{MISSING}.pipeline=[]'], ["stream 'target'", 'no/such/folder']),
], ids=['sampler', 'old-key', 'classes', 'folder'])
def test_mistakes_are_named_before_training(tmp_path, options, words):
    small = [option for option in train_options(2)
             if not option.startswith(MISSING) or MISSING not in options[0]]
    command = [sys.executable, 'tools/train.py', CONFIG, '--work-dir',
               str(tmp_path), '--cfg-options', *small, *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines()
            if line.startswith('error: ')]
    assert len(said) == 1, done.stderr[-2000:]
    for word in words:
        assert word in said[0]
    assert 'Traceback' not in done.stderr
    assert 'Iter(train)' not in done.stdout


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_breaks_later_is_named(tmp_path, workers):
    """Found only when its turn comes; no hang, one sentence."""
    import cv2
    import numpy as np
    folder = tmp_path / 'images'
    folder.mkdir()
    for i in range(6):
        cv2.imwrite(str(folder / f'{i}.png'),
                    np.full((128, 256, 3), 40 * i, np.uint8))
    (folder / '4.png').write_bytes(b'not an image')
    pipeline = ("[dict(type='LoadImageFromFile'),"
                "dict(type='RandomCrop',crop_size=(128,128)),"
                "dict(type='PackStreamInputs')]")
    script = tmp_path / 'config.py'
    script.write_text(
        f"_base_ = '{ROOT}/{CONFIG}'\n"
        'train_dataloader = dict(dataset=dict(streams=dict(target=dict('
        "dataset=dict(_delete_=True, type='BaseSegDataset', "
        f"img_suffix='.png', data_prefix=dict(img_path='{folder}'), "
        f'pipeline={pipeline})))))\n')
    options = [o for o in train_options(20, workers)
               if 'target.dataset.num_images' not in o]
    done = subprocess.run(
        [sys.executable, 'tools/train.py', str(script), '--work-dir',
         str(tmp_path / 'work'), '--cfg-options', *options],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines()
            if line.startswith('error: ')]
    assert len(said) == 1 and '4.png' in said[0], done.stderr[-2000:]
