"""Whole runs through mmengine: resume, stock tools, two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.runner import Runner

from processes import on_ranks

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / 'tools'
STOCK_TOOLS = Path(mmseg.__file__).parent / '.mim' / 'tools'
CONFIG = ROOT / 'configs/quickstart/uda.py'
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


def new_process(script, *args):
    """Run a tool as its user does."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, args)], cwd=ROOT,
        capture_output=True, text=True, timeout=300,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))


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


def test_resume_continues_exactly(tmp_path, run_tool):
    """Losses, weights and teachers of 3 + 3 iterations equal those of 6.

    The last 3 are those of the stock tool in a process of its own.
    """
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    run_tool(TOOLS / 'train.py', CONFIG, '--work-dir', whole,
             '--cfg-options', *train_options(6, workers=1))
    # Stopped after 3 of 6 iterations; other workers than the whole run.
    run_tool(TOOLS / 'train.py', CONFIG, '--work-dir', parts,
             '--cfg-options', *train_options(3, workers=2))
    done = new_process(
        STOCK_TOOLS / 'train.py', CONFIG, '--work-dir', parts, '--resume',
        '--cfg-options', *train_options(6, workers=2))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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


def test_stock_tools_run_our_configs(tmp_path, run_tool):
    run_tool(STOCK_TOOLS / 'train.py', CONFIG, '--work-dir', tmp_path,
             '--cfg-options', *train_options(2, interval=2))
    options = ['--cfg-options', *SMALL, 'test_dataloader.num_workers=0',
               'test_dataloader.persistent_workers=False']
    both = []
    for script in (STOCK_TOOLS / 'test.py', TOOLS / 'test.py'):
        out = tmp_path / script.parent.parent.name
        run_tool(script, CONFIG, tmp_path / 'iter_2.pth', '--work-dir', out,
                 *options)
        result = json.loads(next(out.glob('*/*.json')).read_text())
        both.append(result['mIoU'])
    assert both[0] == both[1]
    # Test-time augmentation, by student and teacher.
    out = tmp_path / 'tta'
    run_tool(TOOLS / 'test.py', CONFIG, tmp_path / 'iter_2.pth',
             '--work-dir', out, '--tta', *options,
             'test_dataloader.dataset.num_images=2',
             'model.predict_with=both',
             'test_evaluator.field=teacher_pred_sem_seg',
             'test_evaluator.prefix=teacher')
    result = json.loads(next(out.glob('*/*.json')).read_text())
    assert 0 <= result['teacher/mIoU'] <= 100


def five_iterations_of_a_rank(folder, options):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(options)
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', broadcast_buffers=False,
        device_ids=None)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.work_dir = str(folder)
    cfg.default_hooks.checkpoint.interval = 100
    runner = Runner.from_cfg(cfg)
    runner.model.module.keep_step = True
    runner.train()
    model = runner.model.module
    step = model.last_step
    torch.save(dict(
        state=dict(model.state_dict()),
        origin=step.view('mixed').extras['origin'],
        source=step.view('source').images,
        q=step.pseudo_labels['target'].parts[0][0],
        confidence=step.pseudo_labels['target'].confidence,
    ), folder / f'rank{get_rank()}.pth')


def test_two_ranks_agree_on_weights_and_differ_in_draws(tmp_path):
    options = {}
    for option in train_options(5):
        key, value = option.split('=', 1)
        try:
            options[key] = eval(value)
        except NameError:
            options[key] = value
    options['custom_hooks'] = [dict(type='PositionHook'),
                               dict(type='NormSyncHook')]
    on_ranks(five_iterations_of_a_rank, tmp_path, options)
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
def test_mistakes_are_named_before_training(
        tmp_path, run_tool, capsys, options, words):
    small = [option for option in train_options(2)
             if not option.startswith(MISSING) or MISSING not in options[0]]
    with pytest.raises(SystemExit) as ended:
        run_tool(TOOLS / 'train.py', CONFIG, '--work-dir', tmp_path,
                 '--cfg-options', *small, *options)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith('error: ')]
    assert len(said) == 1, err[-2000:]
    for word in words:
        assert word in said[0]
    assert 'Traceback' not in err
    assert 'Iter(train)' not in out


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_breaks_later_is_named(
        tmp_path, run_tool, capsys, workers):
    """Found only when its turn comes; no hang, one sentence."""
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
        f"_base_ = '{CONFIG}'\n"
        'train_dataloader = dict(dataset=dict(streams=dict(target=dict('
        "dataset=dict(_delete_=True, type='BaseSegDataset', "
        f"img_suffix='.png', data_prefix=dict(img_path='{folder}'), "
        f'pipeline={pipeline})))))\n')
    options = [o for o in train_options(20, workers)
               if 'target.dataset.num_images' not in o]
    command = [TOOLS / 'train.py', script, '--work-dir', tmp_path / 'work',
               '--cfg-options', *options]
    if workers:
        done = new_process(*command)
        code, err = done.returncode, done.stderr
    else:
        with pytest.raises(SystemExit) as ended:
            run_tool(*command)
        code, err = ended.value.code, capsys.readouterr().err
    assert code == 1
    said = [line for line in err.splitlines() if line.startswith('error: ')]
    assert len(said) == 1 and '4.png' in said[0], err[-2000:]
