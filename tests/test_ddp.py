"""Two ranks are one process with both batches; every method trains on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddp_common
import ddp_methods
from helpers import build
from mmseg_contrast.engine import refuse_other_wrappers

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
#: One config of each method.
METHODS = sorted([
    'cluda/cluda_daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512',
    'cluda/cluda_hrda_mit-b5_1xb2-40k_gta2cityscapes-1024x1024',
    'contrastive_seg/contrastive-seg-memory_deeplabv3_r101-d8_4xb2-40k_'
    'cityscapes-512x1024',
    'contrastive_seg/contrastive-seg_deeplabv3_r101-d8_4xb2-40k_'
    'cityscapes-512x1024',
    'dacs/dacs_deeplabv2_r101-d8_1xb2-250k_gta2cityscapes-512x512',
    'daformer/daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512',
    'hrda/hrda_mit-b5_1xb2-40k_gta2cityscapes-1024x1024',
    'label_efficient/label-efficient-cross_deeplabv3_r101-d8_1xb8-40k_'
    'cityscapes-512x512',
    'local_contrast/local-contrast-strided_segformer_mobilenet-v2-w035_'
    '1xb2-800_nuclei-fluo2he-256x256',
    'mic/mic_daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512',
    'mic/mic_hrda_mit-b5_1xb2-40k_gta2cityscapes-1024x1024',
    'mochi/mochi_deeplabv3_r101-d8_4xb2-40k_cityscapes-512x1024',
    'pipa/pipa_mit-b5_1xb2-40k_gta2cityscapes-512x512',
    'proca/proca_deeplabv2_r101-d8_4xb2-90k_gta2cityscapes-512x512',
    'protoseg/protoseg_deeplabv3_r101-d8_4xb2-40k_cityscapes-512x1024',
    'rekd/rekd_mit-b0_1xb2-40k_gta2cityscapes-512x512',
    'sdca/sdca_deeplabv2_r101-d8_4xb2-40k_gta2cityscapes-512x512',
    'sdca/sdca-stage3_deeplabv2_r101-d8_4xb2-20k_gta2cityscapes-512x512',
    'sepico/sepico-bank_daformer_mit-b5_1xb2-40k_gta2cityscapes-640x640',
    'sepico/sepico-dist_daformer_mit-b5_1xb2-40k_gta2cityscapes-640x640',
    'sepico/sepico-proto_daformer_mit-b5_1xb2-40k_gta2cityscapes-640x640',
    'source_only/source-only_daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512',
    'spcl/spcl_deeplabv2_r101-d8_4xb2-40k_gta2cityscapes-512x512'])


def launch(script, *arguments, timeout=400):
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         '--nproc_per_node=2', str(ROOT / 'tests' / script), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env=dict(os.environ, OMP_NUM_THREADS='1',
                 PYTHONPATH=f'{ROOT}:{ROOT / "tests"}'))


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    done = launch('ddp_common.py', str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f'rank{rank}.pth', weights_only=True)
            for rank in range(2)]


@pytest.mark.parametrize(('bank', 'mode'), ddp_common.CASES)
def test_two_ranks_are_one_process(ranks, bank, mode, monkeypatch):
    monkeypatch.setattr(ddp_common.ClassMix, 'choose', None)
    monkeypatch.setattr(ddp_common.StrongAugment, 'draw', None)
    one = ddp_common.train(bank, mode)
    two, other = (rank[f'{bank}.{mode}'] for rank in ranks)
    assert set(two) == set(one)
    for key, value in two.items():
        assert torch.equal(value, other[key]), key
        torch.testing.assert_close(
            value, one[key], rtol=1e-8, atol=1e-10, msg=key)
    fresh = ddp_common.make(bank, mode).state_dict()
    assert any(not torch.equal(fresh[key], value)
               for key, value in two.items() if 'backbone' in key)
    if bank is not None:
        assert two['auxiliary_head.bank.count'].sum() > 0


def train_methods(folder, steps, names, timeout):
    result = folder / 'methods.json'
    paths = [str(CONFIGS / f'{name}.py') for name in names]
    done = launch('ddp_methods.py', str(result), str(steps), *paths,
                  timeout=timeout)
    found = {}
    for rank in (0, 1):
        part = Path(f'{result}.{rank}')
        if part.is_file():
            for path, one in json.loads(part.read_text()).items():
                name = str(Path(path).relative_to(CONFIGS).with_suffix(''))
                found[name] = one if 'error' in one else found.get(name, one)
    assert found, done.stderr[-3000:]
    return found


@pytest.fixture(scope='module')
def methods(tmp_path_factory):
    return train_methods(
        tmp_path_factory.mktemp('methods'), 6, METHODS, 400)


def check(one):
    assert one is not None, 'an earlier method failed'
    assert 'error' not in one, one['error']
    assert one['finite'] and not one['differing']
    assert one['moved'] > 0
    assert not any(one['same_draws'])


@pytest.mark.parametrize('name', METHODS)
def test_a_method_on_two_ranks(methods, name):
    one = methods.get(name)
    check(one)
    mixing = ('dacs', 'daformer', 'hrda', 'mic', 'cluda', 'sepico', 'pipa')
    if name.split('/')[0] in mixing:
        assert one['same_draws'] == [False]
    banks = ('mochi', 'proca', 'protoseg', 'sdca/sdca_', 'sepico',
             'spcl/spcl_', 'contrastive_seg/contrastive-seg-memory')
    if name.startswith(banks):
        assert len(one['banks']) >= 3
    assert max(ddp_methods.EMPTY) < 6


@pytest.mark.slow
def test_every_shipped_config_on_two_ranks(tmp_path):
    names = [str(path.relative_to(CONFIGS).with_suffix(''))
             for path in sorted(CONFIGS.rglob('*.py'))
             if not {'_base_', 'quickstart'} & set(path.parts)]
    found = train_methods(tmp_path, 20, names, 3600)
    for name in names:
        check(found.get(name))


class Sharding(nn.Module):
    """As FSDP and DeepSpeed, which exist on GPUs alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Replicas(Sharding, DistributedDataParallel):

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_wrappers_that_shard_are_refused(monkeypatch):
    model = build()
    refuse_other_wrappers(model)
    refuse_other_wrappers(Sharding(model))  # no wrapper of mmengine's
    monkeypatch.setitem(MODEL_WRAPPERS._module_dict, 'Sharding', Sharding)
    with pytest.raises(ValueError, match='does not train in Sharding'):
        refuse_other_wrappers(Sharding(model))
    refuse_other_wrappers(Sharding(model.segmentor))  # none of our business
    refuse_other_wrappers(Replicas(model))
