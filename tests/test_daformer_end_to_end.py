"""DAFormer with MiT-B5 on files in the true formats, through the tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / ('configs/daformer/'
                 'daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py')
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32,
       33, 4]


def picture(random, height, width):
    small = random.randint(0, 256, (height // 32, width // 32, 3))
    return cv2.resize(small.astype(np.uint8), (width, height))


def label(random, height, width):
    """Blocks of Cityscapes' ids, each larger than rare classes need."""
    blocks = random.permutation(IDS).reshape(4, 5).astype(np.uint8)
    return cv2.resize(blocks, (width, height),
                      interpolation=cv2.INTER_NEAREST)


def write_pair(root):
    """Two images of each side, as the data sets are downloaded."""
    random = np.random.RandomState(0)
    for name in ('images', 'labels'):
        (root / 'data/gta' / name).mkdir(parents=True)
    for i in range(1, 4):
        image = picture(random, 1052, 1914)
        cv2.imwrite(str(root / f'data/gta/images/{i:05d}.png'), image)
        # The third label has another size, as some of the release have.
        ids = Image.fromarray(
            label(random, *((1052, 1914) if i < 3 else (1046, 1914))), 'P')
        ids.putpalette(list(range(256)) * 3)
        ids.save(root / f'data/gta/labels/{i:05d}.png')
    city = root / 'data/cityscapes'
    for split in ('train', 'val'):
        for kind in ('leftImg8bit', 'gtFine'):
            (city / kind / split / 'aachen').mkdir(parents=True)
        for i in range(2):
            stem = f'{split}/aachen/aachen_00000{i}_000019'
            cv2.imwrite(str(city / f'leftImg8bit/{stem}_leftImg8bit.png'),
                        picture(random, 1024, 2048))
            cv2.imwrite(str(city / f'gtFine/{stem}_gtFine_labelIds.png'),
                        label(random, 1024, 2048))


def tool(folder, script, *args):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / script), *map(str, args)],
        cwd=folder, capture_output=True, text=True, timeout=1500,
        env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, (done.stdout[-3000:]
                                       + done.stderr[-3000:])
    return done.stdout + done.stderr


@pytest.mark.slow
def test_three_iterations_and_an_evaluation(tmp_path):
    write_pair(tmp_path)
    said = tool(tmp_path, 'dataset_converters/gta.py', 'data/gta')
    assert '00003' in said
    tool(tmp_path, 'dataset_converters/cityscapes.py', 'data/cityscapes')

    # Stands for the ImageNet weights, which the config would download.
    cfg = Config.fromfile(CONFIG)
    backbone = cfg.model.segmentor.backbone
    backbone.pop('init_cfg')
    torch.manual_seed(0)
    made = MODELS.build(backbone)
    made.init_weights()
    torch.save(made.state_dict(), tmp_path / 'mit_b5.pth')

    options = [
        'model.segmentor.backbone.init_cfg.checkpoint='
        f'{tmp_path / "mit_b5.pth"}', 'train_cfg.max_iters=3',
        'train_cfg.val_interval=3', 'default_hooks.checkpoint.interval=3',
        'default_hooks.logger.interval=1', 'log_processor.window_size=1',
        'train_dataloader.num_workers=1', 'randomness.seed=0']
    tool(tmp_path, 'train.py', CONFIG, '--work-dir', 'work', '--cfg-options',
         *options)
    logged = [json.loads(line) for line in next(
        (tmp_path / 'work').glob('*/vis_data/scalars.json')
    ).read_text().splitlines()]
    steps = [row for row in logged if 'source.decode.loss_ce' in row]
    assert [row['step'] for row in steps] == [1, 2, 3]
    for row in steps:
        # 19 classes, hardly trained: the cross entropy of a guess.
        assert 1.5 < row['source.decode.loss_ce'] < 4.5
        assert row['feature_distance.loss_feature_distance'] >= 0
        assert 0 <= row['mixed.decode.loss_ce'] < 4.5
        assert row['base_lr'] < 1.3e-7
    assert [row['ema.momentum'] for row in steps] == pytest.approx(
        [0, 1 / 2, 2 / 3], abs=1e-4)
    # Stochastic depth alone moves the student from the frozen copy.
    seen = [row for row in steps if row['source.thing_ratio'] > 0]
    assert seen
    assert all(row['feature_distance.loss_feature_distance'] > 0
               for row in seen)

    tool(tmp_path, 'test.py', CONFIG, 'work/iter_3.pth', '--work-dir',
         'test')
    found = json.loads(next(
        (tmp_path / 'test').glob('*/*.json')).read_text())
    validated = logged[-1]
    assert found['mIoU'] == pytest.approx(validated['mIoU'], abs=0.01)
    assert 'IoU.road' in found
