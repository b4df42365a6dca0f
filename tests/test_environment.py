import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub

import mmseg_contrast
from mmseg_contrast import environment

ROOT = Path(__file__).resolve().parents[1]
ONEDL = 'pip install "mmseg_contrast[onedl]"'
OPENMMLAB = 'pip install "mmseg_contrast[openmmlab]"'


def run_python(code):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-c', code],
                          env=env,
                          capture_output=True,
                          text=True)


def fake_stack(monkeypatch, installed, failing=None, error=None):
    """Pretend that these distributions are there and one import fails."""

    def import_module(name):
        if name == failing:
            raise error

    monkeypatch.setattr(environment, 'installed_version', installed.get)
    monkeypatch.setattr(environment, 'import_module', import_module)


def message_of(monkeypatch, installed, failing=None, error=None):
    fake_stack(monkeypatch, installed, failing, error)
    with pytest.raises(ImportError) as info:
        environment.check_environment()
    message = str(info.value)
    # One sentence, and the first thing that went wrong is kept.
    assert message.endswith('.') and '\n' not in message
    assert info.value.__cause__ is error
    return message


STOCK = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmsegmentation': '1.2.2'}
FORKS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmsegmentation': '1.4.2'
}


@pytest.mark.parametrize('stack', [STOCK, FORKS])
def test_whole_stack_is_accepted_without_a_word(monkeypatch, stack, recwarn):
    fake_stack(monkeypatch, stack)
    environment.check_environment()
    assert not recwarn.list


def test_nothing_installed(monkeypatch):
    error = ModuleNotFoundError("No module named 'mmengine'", name='mmengine')
    message = message_of(monkeypatch, {}, 'mmengine', error)
    assert message == (
        'mmseg_contrast needs a working OpenMMLab stack, but mmengine is '
        f'missing: run `{ONEDL}`, or `{OPENMMLAB}` for the stock releases.')


def test_real_import_without_mmcv_names_what_to_install():
    done = run_python("import sys; sys.modules['mmcv'] = None\n"
                      'import mmseg_contrast')
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mmseg_contrast needs a working')
    assert 'but mmcv is missing' in last
    assert 'mmseg_contrast[onedl]' in last


def test_stock_mmseg_with_an_mmcv_without_operators(monkeypatch):
    error = ModuleNotFoundError("No module named 'mmcv._ext'",
                                name='mmcv._ext')
    installed = {**STOCK, 'mmcv-lite': '2.1.0'}
    del installed['mmcv']
    message = message_of(monkeypatch, installed, 'mmseg.models', error)
    assert 'the installed mmcv has no compiled operators' in message
    # Installing the forks over the stock releases would mix their files.
    assert 'pip uninstall mmengine mmcv-lite mmsegmentation' in message
    assert ONEDL in message


def test_undeclared_requirement_of_stock_mmseg(monkeypatch):
    error = ModuleNotFoundError("No module named 'ftfy'", name='ftfy')
    message = message_of(monkeypatch, STOCK, 'mmseg.models', error)
    assert 'ftfy, which mmseg.models imports, is missing' in message
    assert OPENMMLAB in message


def test_version_assertion_of_mmseg(monkeypatch):
    error = AssertionError('MMCV==2.3.6 is used but incompatible.')
    installed = {'mmsegmentation': '1.2.2', 'onedl-mmcv': '2.3.6'}
    message = message_of(monkeypatch, installed, 'mmseg', error)
    assert ('the installed versions do not fit together (onedl-mmcv 2.3.6, '
            'mmsegmentation 1.2.2)') in message


def test_any_other_failure_keeps_its_first_line(monkeypatch):
    error = OSError('libcudart.so.11: cannot open\nmore')
    message = message_of(monkeypatch, FORKS, 'mmcv', error)
    assert ('importing mmcv fails (OSError: libcudart.so.11: cannot open)'
            in message)


def test_fork_and_release_side_by_side_are_refused(monkeypatch):
    message = message_of(monkeypatch, {**FORKS, 'mmcv': '2.1.0'})
    assert 'pip uninstall mmcv onedl-mmcv' in message


def test_mixture_that_imports_is_warned_of(monkeypatch):
    fake_stack(monkeypatch, {**FORKS, 'onedl-mmengine': None,
                             'mmengine': '0.10.7'})
    with pytest.warns(UserWarning, match='mixture'):
        environment.check_environment()


def test_import_is_quiet_and_registers_everything():
    done = run_python(
        'import mmseg_contrast\n'
        'from mmseg.registry import MODELS, DATASETS, HOOKS\n'
        'from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS as OPTIM\n'
        "assert MODELS.get('UDASegmentor') and HOOKS.get('PositionHook')\n"
        "assert DATASETS.get('StreamDataset')\n"
        "assert OPTIM.get('UDAOptimWrapperConstructor')")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ''
    assert done.stderr == ''


@pytest.fixture
def fresh_allow_list():
    """As after the import; other tests may have loaded through mmengine."""
    environment.allow_checkpoint_classes()


def runner_checkpoint():
    """What mmengine's Runner.save_checkpoint writes, with all its types."""
    hub = MessageHub('test_environment')
    hub.update_scalar('train/loss', 1.5)
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('iter', 7)
    hub.update_info('best_score', np.float32(41.25))
    hub.update_info('dataset_meta',
                    dict(classes=('a', 'b'), palette=np.eye(2, 3, dtype='u1')))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=np.float64(0.1))
    weight.sum().backward()
    optimizer.step()
    return dict(
        meta=dict(
            cfg='model = dict()',
            seed=np.int64(3),
            iter=8,
            dataset_meta=ConfigDict(
                classes=['a', 'b'], label_map=dict(a=1), more=ConfigDict(b=2)),
            hook_msgs=dict(best_score=np.float64(0.5))),
        state_dict=OrderedDict(weight=weight.detach()),
        message_hub=hub.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(last_step=8, _last_value=[np.float64(0.1)])])


def test_own_checkpoints_load_with_weights_only(tmp_path, fresh_allow_list):
    torch.save(runner_checkpoint(), tmp_path / 'iter_8.pth')
    loaded = torch.load(tmp_path / 'iter_8.pth', weights_only=True)

    history = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert history.mean() == 1.0
    assert history.statistics('max') == 1.5  # a method kept in the pickle
    info = loaded['message_hub']['runtime_info']
    assert info['best_score'] == 41.25
    assert info['dataset_meta']['palette'].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert loaded['meta']['dataset_meta'].label_map == dict(a=1)
    assert loaded['meta']['dataset_meta'].more.b == 2
    assert loaded['optimizer']['param_groups'][0]['lr'] == 0.1


def test_arrays_pickled_by_the_other_numpy_generation_load(
        tmp_path, fresh_allow_list):
    path = tmp_path / 'array.pth'
    # The old format is one plain pickle stream, which can be edited.
    torch.save(
        dict(a=np.arange(3.)), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    new, old = b'cnumpy._core.multiarray', b'cnumpy.core.multiarray'
    other = data.replace(new, old) if new in data else data.replace(old, new)
    assert other != data
    path.write_bytes(other)
    loaded = torch.load(path, weights_only=True)
    assert loaded['a'].tolist() == [0., 1., 2.]


class Evil:

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('evil', [
    Evil(os.getcwd),
    Evil(getattr, dict, 'fromkeys'),
    Evil(getattr, HistoryBuffer, '__init__'),
    Evil(getattr, torch.Tensor, 'numpy'),
])
def test_everything_else_is_refused(tmp_path, fresh_allow_list, evil):
    torch.save(dict(state_dict={}, evil=evil), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'evil.pth', weights_only=True)


def test_shipped_path_finds_the_clone_then_the_wheel(tmp_path, monkeypatch):
    expected = ROOT / 'configs' / '_base_' / 'default_runtime.py'
    assert environment.shipped_path(
        'configs/_base_/default_runtime.py') == expected

    wheel = tmp_path / 'site' / 'mmseg_contrast'
    (wheel / '.mim' / 'configs').mkdir(parents=True)
    monkeypatch.setattr(environment, '__file__', str(wheel / 'environment.py'))
    assert environment.shipped_path('configs') == wheel / '.mim' / 'configs'
    with pytest.raises(FileNotFoundError, match='ships no nothing.py'):
        environment.shipped_path('nothing.py')


def test_version_is_of_one_source():
    assert mmseg_contrast.__version__ == '0.1.0'
    assert "version: 0.1.0" in (ROOT / 'CITATION.cff').read_text()
