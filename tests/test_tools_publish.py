import hashlib
import os
import re
import runpy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub

TOOL = Path(__file__).resolve().parents[1] / 'tools' / 'publish.py'
publish = runpy.run_path(str(TOOL))['publish']


def uda_state():
    state = OrderedDict({
        'backbone.weight': torch.tensor([1., 2.]),
        'backbone.bn.num_batches_tracked': torch.tensor(3),
        'backbone.bn.running_mean': torch.tensor([0.1]),
        'decode_head.conv_seg.bias': torch.tensor([7.]),
        'clock.iteration': torch.tensor(9),
        'iteration': torch.tensor(9),
        'teachers.ema.steps': torch.tensor(4),
        'teachers.ema.model.backbone.weight': torch.tensor([5., 6.]),
        'teachers.ema.model.decode_head.conv_seg.bias': torch.tensor([8.]),
        'teachers.frozen.model.backbone.weight': torch.tensor([0., 0.]),
        'objectives.contrast.bank': torch.zeros(4),
        'views.mixed.count': torch.tensor(1),
        'pseudo_labels.target.count': torch.tensor(1),
        'state.bank.queue': torch.zeros(4),
    })
    state._metadata = OrderedDict({
        '': dict(version=1),
        'backbone.bn': dict(version=2),
        'teachers.ema.model': dict(version=1),
        'teachers.ema.model.backbone.bn': dict(version=2),
        'state.bank': dict(version=1),
    })
    return state


@pytest.fixture
def checkpoint(tmp_path):
    hub = MessageHub('test_tools_publish')
    hub.update_scalar('train/loss', 1.)
    path = tmp_path / 'iter_8.pth'
    torch.save(
        dict(
            meta=dict(
                cfg='model = dict()',
                mmseg_version='1.2.2',
                dataset_meta=ConfigDict(
                    classes=('a', 'b'), palette=np.eye(2, dtype='u1')),
                hook_msgs=dict(best=np.float64(0.5))),
            state_dict=uda_state(),
            message_hub=hub.state_dict(),
            optimizer=dict(state={}),
            param_schedulers=[]), path)
    return path


def test_student_alone(checkpoint):
    path = publish(checkpoint, None, teacher=None, fp16=False)
    assert path.parent == checkpoint.parent
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert path.name == f'iter_8-{digest}.pth'

    published = torch.load(path, weights_only=True)
    assert sorted(published) == ['meta', 'state_dict']
    state = published['state_dict']
    assert {k: v.tolist() for k, v in state.items()} == {
        'backbone.weight': [1., 2.],
        'backbone.bn.num_batches_tracked': 3,
        'backbone.bn.running_mean': [pytest.approx(0.1)],
        'decode_head.conv_seg.bias': [7.],
    }
    assert dict(state._metadata) == {
        '': dict(version=1),
        'backbone.bn': dict(version=2)
    }
    assert published['meta'] == dict(
        cfg='model = dict()',
        mmseg_version='1.2.2',
        dataset_meta=dict(classes=('a', 'b'), palette=[[1, 0], [0, 1]]),
        hook_msgs=dict(best=0.5))
    # Nothing temporary stays behind.
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        [path.name, 'iter_8.pth'])


def test_published_file_loads_without_this_package(checkpoint):
    path = publish(checkpoint, None, teacher=None, fp16=False)
    code = ('import sys, torch\n'
            f'torch.load({str(path)!r}, weights_only=True)\n'
            "assert 'mmengine' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_teacher_in_half_precision(checkpoint, tmp_path):
    path = publish(checkpoint, tmp_path / 'new folder', 'ema', fp16=True)
    assert path.parent.name == 'new folder'
    assert re.fullmatch(r'iter_8_ema-[0-9a-f]{8}\.pth', path.name)
    state = torch.load(path, weights_only=True)['state_dict']
    assert {k: v.tolist() for k, v in state.items()} == {
        'backbone.weight': [5., 6.],
        'decode_head.conv_seg.bias': [8.],
    }
    assert all(v.dtype == torch.float16 for v in state.values())
    assert dict(state._metadata) == {
        '': dict(version=1),
        'backbone.bn': dict(version=2)
    }


def test_half_precision_leaves_counts(checkpoint):
    path = publish(checkpoint, None, teacher=None, fp16=True)
    state = torch.load(path, weights_only=True)['state_dict']
    assert state['backbone.bn.num_batches_tracked'].dtype == torch.int64
    assert state['backbone.bn.running_mean'].dtype == torch.float16


def test_equal_weights_get_an_equal_name(checkpoint, tmp_path):
    one = publish(checkpoint, tmp_path / 'one.pth', None, False)
    two = publish(checkpoint, tmp_path / 'two.pth', None, False)
    assert re.fullmatch(r'one-[0-9a-f]{8}\.pth', one.name)
    assert one.name.removeprefix('one') == two.name.removeprefix('two')
    half = publish(checkpoint, tmp_path / 'one.pth', None, True)
    assert half.name != one.name


def test_failed_write_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / 'out'

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        publish(checkpoint, folder, None, False)
    assert list(folder.iterdir()) == []


def test_unknown_teacher_lists_the_names(checkpoint):
    with pytest.raises(ValueError, match='--teacher mean; it has ema, frozen'):
        publish(checkpoint, None, 'mean', False)


def test_plain_checkpoint_has_no_teacher(tmp_path):
    path = tmp_path / 'plain.pth'
    torch.save(dict(state_dict={'backbone.weight': torch.ones(1)}), path)
    with pytest.raises(ValueError, match='it has none'):
        publish(path, None, 'ema', False)
    published = publish(path, None, None, False)
    state = torch.load(published, weights_only=True)['state_dict']
    assert list(state) == ['backbone.weight']


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='There is no checkpoint'):
        publish(tmp_path / 'missing.pth', None, None, False)

    text = tmp_path / 'text.pth'
    text.write_text('hello')
    with pytest.raises(ValueError, match=r'text\.pth is no checkpoint'):
        publish(text, None, None, False)

    tensor = tmp_path / 'tensor.pth'
    torch.save(torch.ones(1), tensor)
    with pytest.raises(ValueError, match='it has no state_dict'):
        publish(tensor, None, None, False)

    empty = tmp_path / 'empty.pth'
    torch.save(dict(state_dict={'state.x': torch.ones(1)}), empty)
    with pytest.raises(ValueError, match='holds no weights of a student'):
        publish(empty, None, None, False)


def test_command_line(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [str(TOOL), str(checkpoint)])
    runpy.run_path(str(TOOL), run_name='__main__')
    assert Path(capsys.readouterr().out.strip()).is_file()

    monkeypatch.setattr(
        sys, 'argv', [str(TOOL), str(checkpoint), '--teacher', 'no'])
    with pytest.raises(SystemExit, match='publish: The checkpoint has no'):
        runpy.run_path(str(TOOL), run_name='__main__')
