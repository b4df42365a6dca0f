"""Two ranks are one process with both batches; every method trains on two."""

import json
from pathlib import Path

import fsdp_run
import pytest
import torch
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddp_common
import ddp_methods
from helpers import build
from mmseg_contrast.engine import refuse_other_wrappers
from processes import on_ranks

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


def test_two_ranks_are_one_process(tmp_path, monkeypatch):
    on_ranks(ddp_common.train_all, tmp_path)
    two, other = (torch.load(tmp_path / f'rank{rank}.pth', weights_only=True)
                  for rank in range(2))
    for part, draw in ((ddp_common.ClassMix, 'choose'),
                       (ddp_common.StrongAugment, 'draw'),
                       (ddp_common.BlockMask, 'draw'),
                       (ddp_common.HRDASegmentor, 'draw_box')):
        monkeypatch.setattr(part, draw, None)
    for method, mode in ddp_common.CASES:
        case = f'{method}.{mode}'
        one = ddp_common.train(method, mode)
        fresh = ddp_common.make(method, mode).state_dict()
        assert set(two[case]) == set(one)
        for key, value in two[case].items():
            assert torch.equal(value, other[case][key]), (case, key)
            torch.testing.assert_close(
                value, one[key], rtol=1e-8, atol=1e-10, msg=f'{case} {key}')
        assert any(not torch.equal(fresh[key], value)
                   for key, value in one.items() if 'backbone' in key)
        if method in ddp_common.BANKS:
            assert one['auxiliary_head.bank.count'].sum() > 0


#: Methods that paste, and methods with a memory.
MIXING = ('dacs', 'daformer', 'hrda', 'mic', 'cluda', 'sepico', 'pipa')
BANKS = ('mochi', 'proca', 'protoseg', 'sdca/sdca_', 'sepico', 'spcl/spcl_',
         'contrastive_seg/contrastive-seg-memory')


def check_methods(folder, steps, names, timeout):
    paths = {name: str(CONFIGS / f'{name}.py') for name in names}
    on_ranks(ddp_methods.train_each, folder, steps, list(paths.values()),
             timeout=timeout)
    found = json.loads((folder / 'found.json').read_text())
    for name, path in paths.items():
        one = found[path]
        assert one['finite'] and not one['differing'], (name, one)
        assert one['moved'] > 0, name
        assert not any(one['same_draws']), name
        if name.startswith(MIXING):
            assert one['same_draws'] == [False], name
        if name.startswith(BANKS) and 'stage' not in name:
            assert len(one['banks']) >= 3, name


def test_each_method_on_two_ranks(tmp_path):
    assert max(ddp_methods.EMPTY) < 6
    check_methods(tmp_path, 6, METHODS, 400)


@pytest.mark.slow
def test_every_shipped_config_on_two_ranks(tmp_path):
    check_methods(tmp_path, 20, [
        str(path.relative_to(CONFIGS).with_suffix(''))
        for path in sorted(CONFIGS.rglob('*.py'))
        if not {'_base_', 'quickstart'} & set(path.parts)], 3600)


class Sharding(nn.Module):
    """As DeepSpeed's, which is not installed."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Replicas(Sharding, DistributedDataParallel):

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_mmengines_fsdp_is_refused_before_the_first_iteration(tmp_path):
    on_ranks(fsdp_run.train, tmp_path, ranks=1)
    said = (tmp_path / 'said.txt').read_text()
    assert said.startswith(
        'UDASegmentor does not train in MMFullyShardedDataParallel')


def test_wrappers_that_shard_are_refused(monkeypatch):
    model = build()
    refuse_other_wrappers(model)
    refuse_other_wrappers(Sharding(model))  # no wrapper of mmengine's
    monkeypatch.setitem(MODEL_WRAPPERS._module_dict, 'Sharding', Sharding)
    with pytest.raises(ValueError, match='does not train in Sharding'):
        refuse_other_wrappers(Sharding(model))
    refuse_other_wrappers(Sharding(model.segmentor))  # none of our business
    refuse_other_wrappers(Replicas(model))
