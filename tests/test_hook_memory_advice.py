"""What a run says that is out of memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from helpers import dacs_parts, tiny_student
from mmseg_contrast.engine.hooks import MemoryAdviceHook
from mmseg_contrast.engine.out_of_memory import advice, is_out_of_memory


def config(**changes):
    student = tiny_student()
    student['backbone'] = dict(type='ResNetV1c', depth=18)
    cfg = Config(dict(
        model=dict(type='UDASegmentor', segmentor=student, **dacs_parts()),
        optim_wrapper=dict(type='OptimWrapper'),
        data_preprocessor=dict(size=(64, 32)),
        train_dataloader=dict(batch_size=2, num_workers=3, dataset=dict(
            streams=dict(source=dict(cache=True), target=dict())))))
    cfg.merge_from_dict(changes)
    return cfg


def run(error, **changes):
    """The lines that the log gets, and what is raised."""
    said = []

    def run_iter(batch):
        if error is not None:
            raise error
        return batch

    runner = SimpleNamespace(
        cfg=config(**changes), iter=4, train_loop=SimpleNamespace(
            run_iter=run_iter), logger=SimpleNamespace(error=said.append))
    MemoryAdviceHook().before_train(runner)
    try:
        runner.train_loop.run_iter('batch')
    except Exception as found:
        return said, found
    return said, None


@pytest.mark.parametrize('error', [
    MemoryError(), torch.cuda.OutOfMemoryError('CUDA out of memory.'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')])
def test_out_of_memory_is_explained_and_raised_again(error):
    said, found = run(error)
    assert found is error
    assert len(said) == 1
    assert said[0].startswith('Out of memory on the CPU in iteration 5. ')
    assert 'train_dataloader.batch_size = 2' in said[0]


def test_other_errors_are_not():
    error = RuntimeError('mat1 and mat2 shapes cannot be multiplied')
    assert run(error) == ([], error)
    assert run(None) == ([], None)
    assert not is_out_of_memory(ValueError('out of memory'))


def test_advice_names_what_the_config_has():
    said = advice(config(), on_gpu=True)
    for words in ("optim_wrapper.type = 'AmpOptimWrapper' (--amp)",
                  'model.segmentor.backbone.with_cp = True',
                  'train_dataloader.batch_size = 2',
                  'data_preprocessor.size = (64, 32)'):
        assert words in said
    assert said.index('--amp') < said.index('with_cp') < said.index('batch_s')
    assert 'num_workers' not in said
    done = advice(config(**{
        'optim_wrapper.type': 'AmpOptimWrapper',
        'model.segmentor.backbone.with_cp': True}), on_gpu=True)
    assert 'Amp' not in done and 'with_cp' not in done
    host = advice(config(), on_gpu=False)
    assert 'streams.source.cache = True' in host
    assert 'streams.target' not in host
    assert 'train_dataloader.num_workers = 3' in host and 'amp' not in host
    assert advice(Config({}), on_gpu=True)


def test_real_allocation_that_is_too_large():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)


def test_advice_for_a_shipped_config():
    root = Path(__file__).resolve().parents[1] / 'configs'
    cfg = Config.fromfile(root / 'quickstart' / 'uda.py')
    assert 'model.segmentor.backbone.with_cp = True' in advice(cfg, True)
