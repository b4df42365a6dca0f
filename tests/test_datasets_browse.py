"""The browsing tool draws what the loader delivers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config

from datasets_common import files_pipeline, folder, write_folder
from mmseg_contrast.datasets import StreamDataset

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools/analysis_tools/browse_pair.py'


def tool():
    spec = importlib.util.spec_from_file_location('browse_pair', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overlay():
    image = np.full((1, 3, 3), 100, np.uint8)
    drawn = tool().overlay(image, np.array([[0, 1, 255]]),
                           np.array([[0, 0, 0], [200, 100, 0]]), 0.5)
    assert drawn.tolist() == [[[50, 50, 50], [150, 100, 50],
                               [100, 100, 100]]]


def test_rows(tmp_path, run_tool):
    root = write_folder(tmp_path / 'a', 3)
    pipe = files_pipeline(dict(type='MarkValidRegion', left=8),
                          pack='PackStreamInputs')
    streams = dict(
        source=dict(dataset=folder(root, files_pipeline())),
        target=dict(labelled=False, ratio=2, dataset=folder(root, pipe)))
    config = Config(dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['mmseg_contrast']),
        randomness=dict(seed=4),
        train_dataloader=dict(
            dataset=dict(type='StreamDataset', streams=streams))))
    config.dump(str(tmp_path / 'config.py'))
    run_tool(TOOL, tmp_path / 'config.py', '--out', tmp_path / 'out',
             '--number', 2)
    files = sorted((tmp_path / 'out').iterdir())
    assert [f.name for f in files] == ['position_0000.png',
                                       'position_0001.png']
    drawn = cv2.imread(str(files[1]))
    # source, labels, and twice (target, region), with gaps
    assert drawn.shape == (24, 6 * 32 + 5 * 4, 3)
    item = StreamDataset(streams, seed=4)[1]
    want = item['inputs']['source'].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(drawn[:, :32]), want)
    region = drawn[:, -32:]
    assert (region[:, :8] <= 64).all() and region[:, 8:].max() > 200
