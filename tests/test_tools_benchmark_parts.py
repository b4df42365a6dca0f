"""tools/benchmark.py backbone and loader, tiny. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from benchmark_tool import (
    backbone,
    call,
    columns,
    loader,
    memory,
    update,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = backbone.ImageSizes(samples=2, height=64, width=96)


def test_fused_attention_keeps_less_and_computes_the_same(
        monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(backbone.NETS, 'b0', (8, (1, 1, 1, 1)))
    monkeypatch.setattr(backbone, 'peak_in_new_process', lambda case: 2**20)
    file = tmp_path / 'backbone.json'
    call(monkeypatch, 'backbone', '--nets', 'b0', '--sizes', 'height=64',
         'width=96', '--turns', '2', '--json', file)
    (net, ) = json.loads(file.read_text())['nets']
    stock, ours = net['rows']
    assert [one['kind'] for one in (stock, ours)] == [
        'MixVisionTransformer', 'SDPAMixVisionTransformer']
    assert ours['kept'] < stock['kept'] and ours['peak'] == 2**20
    assert net['outputs'] < 1e-5 and net['gradients'] < 1e-5
    assert stock['train_ratio']['median'] == 1
    lines = capsys.readouterr().out.splitlines()
    cells = [columns(line) for line in lines if line.startswith('| SDPA')]
    assert len(cells) == 1 and len(cells[0]) == 7


def test_what_is_kept_is_counted_once_and_without_weights():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(6))

        def forward(self, images):
            # The weight and the product, which two operations keep; the
            # images for the weight's gradient; one output in double.
            product = images * self.weight
            return [product.sin() * product.cos()]

    images = torch.ones(2, 6)
    kept = backbone.kept_bytes(Net(), images, 'float32')
    # images, product, sin, cos, and their product, which is squared
    assert kept == 5 * 2 * 6 * 4


def test_a_peak_is_that_of_the_case():
    case = dict(kind='SDPAMixVisionTransformer', net='b0', device='cpu',
                amp='float32', sizes=dict(samples=1, height=32, width=32))
    assert backbone.peak_of(case) >= 0
    assert memory.TOOL.is_file()


class Stream:
    """Loads once, crops three times."""

    def __init__(self, reader):
        self.readers = [reader]

    def draw(self, seed, position, k):
        (reader, ) = self.readers
        loaded = reader.load(position)
        return [reader.finish(loaded) for _ in range(3)]


class Reader:
    def load(self, index):
        return index

    def finish(self, results):
        return results


def test_stages_are_counted_and_left_as_they_were():
    dataset = type('Data', (), {})()
    reader = Reader()
    dataset.streams = dict(source=Stream(reader))
    found = loader.stages(dataset, 4)
    assert found['source']['loads'] == 1 and found['source']['finishes'] == 3
    assert found['source']['load'] > 0 and found['source']['rest'] > 0
    assert not vars(reader)


def test_samples_per_second(monkeypatch, tmp_path, capsys):
    file = tmp_path / 'loader.json'
    call(monkeypatch, 'loader', '--config',
         ROOT / 'configs' / 'quickstart' / 'uda.py', '--workers', '0', '1',
         '--batches', '1', '--turns', '2', '--json', file, '--cfg-options',
         'train_dataloader.batch_size=2',
         'train_dataloader.dataset.streams.source.dataset.num_images=4',
         'train_dataloader.dataset.streams.target.dataset.num_images=4')
    result = json.loads(file.read_text())
    assert [row['workers'] for row in result['rows']] == [0, 1]
    assert all(len(row['seconds']) == 2 for row in result['rows'])
    assert set(result['stages']) == {'source', 'target'}
    assert result['stages']['target']['loads'] == 1
    assert result['batch_size'] == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert columns(line)[0] == '1'


@pytest.mark.parametrize('options, words', [
    (['--config', 'none.py'], 'no such file'),
    (['--config', ROOT / 'configs/quickstart/uda.py', '--workers', '-1'],
     '0 or above'),
    (['--config', ROOT / 'configs/quickstart/uda.py', '--clock', 'process'],
     'wall clock')])
def test_what_cannot_be_measured_is_refused(monkeypatch, options, words):
    with pytest.raises(SystemExit, match=words):
        call(monkeypatch, 'loader', *options)


def test_all_forms_of_an_update_are_measured(
        monkeypatch, tmp_path, capsys):
    config = ROOT / 'configs' / 'quickstart' / 'uda.py'
    file = tmp_path / 'update.json'
    call(monkeypatch, 'update', '--config', config, '--turns', '2',
         '--json', file)
    result = json.loads(file.read_text())
    rows = {row['form']: row for row in result['rows']}
    assert list(rows) == [
        'tensor by tensor', 'foreach', 'a group for each tensor',
        'groups merged', 'groups merged, fused']
    # The stock constructor has a group for each tensor it was told about.
    assert rows['a group for each tensor']['groups'] == result['tensors']
    assert rows['groups merged']['groups'] == 3
    assert rows['foreach']['what'] == "teacher's average"
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| student's AdamW") for line in lines) == 3
    teacher, student = ([torch.full((3, ), value)] for value in (1., 3.))
    other = [teacher[0].clone()]
    update.one_by_one(teacher, student)
    update.ema_update(other, student, update.ALPHA)
    torch.testing.assert_close(teacher, other)
    assert teacher[0][0] == pytest.approx(1.002)
