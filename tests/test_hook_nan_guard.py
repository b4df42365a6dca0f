"""NaNGuardHook: nothing that is not finite gets into weights unseen."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmseg.registry import MODELS

from datasets_common import streets
from helpers import ScaledWrapper, batch, build, dacs_parts, tiny_student
from mmseg_contrast.engine import finite
from mmseg_contrast.engine.finite import NonFiniteError
from mmseg_contrast.engine.hooks import NaNGuardHook, nan_guard
from mmseg_contrast.engine.mistakes import one_sentence
from mmseg_contrast.engine.safe_step import FUSED, HOST, LATE, SCALER, way_of
from mmseg_contrast.engine.saved_batch import load_batch
from processes import on_ranks

ROOT = Path(__file__).resolve().parent.parent
NAN, INF = float('nan'), float('inf')


def wrapper_of(model, way=HOST, **options):
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=1e-3,
        fused=way == FUSED)
    kind = ScaledWrapper if way == SCALER else OptimWrapper
    return kind(optimizer=optimizer, **options)


class Trainer:
    """As much of a runner as the hook needs."""

    def __init__(self, model, hook, work_dir, wrapper=None):
        self.model, self.hook, self.work_dir = model, hook, str(work_dir)
        self.optim_wrapper = wrapper or wrapper_of(model)
        self.iter, self.max_iters, self.seed = 0, 10**6, 3
        self.hooks = [SimpleNamespace(by_epoch=False, interval=100)]
        self.outputs = []
        hook.before_train(self)

    def train(self, *batches):
        for data in batches:
            self.model.train()
            self.hook.before_train_iter(self, self.iter, data)
            outputs = self.model.train_step(
                copy.deepcopy(data), self.optim_wrapper)
            self.outputs.append(outputs)
            self.hook.after_train_iter(self, self.iter, data, outputs)
            self.iter += 1
        return self


def images(stream='source', value=NAN, seed=7):
    """A batch of which an image is not finite."""
    data = batch(seed=seed)
    one = data['inputs'][stream][1].float()
    one[0, 3, 4] = value
    data['inputs'][stream][1] = one
    data['data_samples'][stream][1].set_metainfo(
        dict(img_path=f'{stream}/broken.png'))
    return data


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def moved(before, after, but=()):
    """Keys of floating tensors that have changed."""
    return [key for key, value in before.items()
            if value.is_floating_point() and not any(
                one in key for one in but)
            and not torch.equal(value, after[key])]


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(
        nan_guard, 'print_log',
        lambda text, logger=None, level=logging.INFO: lines.append(
            (level, text)))
    return lines


# -- what is said ----------------------------------------------------------


@pytest.mark.parametrize('way', [HOST, FUSED, SCALER])
@pytest.mark.parametrize('value', [NAN, INF])
def test_guard_stops_and_says_where(tmp_path, way, value):
    model = build()
    trainer = Trainer(model, NaNGuardHook(), tmp_path,
                      wrapper_of(model, way)).train(batch())
    before = weights_of(model)
    with pytest.raises(NonFiniteError) as error:
        # by the next iteration at the latest
        trainer.train(images(value=value), batch(seed=1))
    text = str(error.value)
    assert text.startswith(
        "Iteration 2: source.decode.loss_ce is nan, on 'source'. Images of "
        "the stream 'source' are not finite as loaded: source/broken.png. "
        'The batch is in ')
    assert trainer.iter == (1 if way == HOST else 2)
    if way == HOST:
        # what the student has learned is as it was
        assert moved(before, weights_of(model), but=['running', 'teach']
                     ) == []
    assert finite.broken_weights(model, buffers=False) == []
    assert (tmp_path / 'nan_guard' / 'iter_000002_rank0.pt').exists()


def spoil(module, place):
    """A module whose result is not finite."""
    real = module.forward

    def forward(*args, **options):
        result = real(*args, **options)
        place(result)
        return result

    module.forward = forward


def described(model, tmp_path, data=None, **options):
    hook = NaNGuardHook(**options)
    with pytest.raises(NonFiniteError) as error:
        Trainer(model, hook, tmp_path).train(data or batch())
    return str(error.value)


def test_guard_names_a_view(tmp_path):
    model = build()
    spoil(model.views['mixed_strong'],
          lambda view: view.images[0, 0].fill_(INF))
    text = described(model, tmp_path)
    assert "mixed.decode.loss_ce is nan, on 'mixed_strong'." in text
    assert "Images of the view 'mixed_strong' are not finite." in text


def test_guard_names_a_teacher(tmp_path):
    """Its NaN labels nothing, so another fault makes the loss show."""
    model = build()
    model.teachers['ema'].predict = (
        lambda view, seen: torch.full((2, 5, 32, 32), NAN))
    trainer = Trainer(model, NaNGuardHook(), tmp_path).train(batch())
    assert all(one.isfinite() for one in trainer.outputs[0].values())
    loss = model.objectives['mixed'].forward
    model.objectives['mixed'].forward = lambda step: {
        key: value + NAN for key, value in loss(step).items()}
    with pytest.raises(NonFiniteError, match="mixed.decode.loss_ce is nan, on "
                       "'mixed_strong'. Probabilities of the teacher 'ema' "
                       "on 'target' are not finite."):
        trainer.train(batch())


@pytest.mark.parametrize('part, words', [
    ('backbone', "The student's features of the view 'source' are not "
     'finite, though its images and all weights are.'),
    ('decode_head', "The student's logits of the view 'source' are not "
     'finite, though its features are.')])
def test_guard_names_a_pass(tmp_path, part, words):
    model = build()
    if part == 'backbone':
        real = model.segmentor.backbone.forward
        model.segmentor.backbone.forward = lambda x: [
            one * INF for one in real(x)]
    else:
        real = model.segmentor.decode_head.cls_seg
        model.segmentor.decode_head.cls_seg = lambda x: real(x) * NAN
    assert words in described(model, tmp_path)


def test_guard_names_a_loss_and_labels(tmp_path):
    model = build()
    loss = model.objectives['source'].forward
    model.objectives['source'].forward = lambda step: {
        key: value * INF for key, value in loss(step).items()}
    data = batch()
    for one in data['data_samples']['source']:
        one.gt_sem_seg.data.fill_(255)
    text = described(model, tmp_path, data)
    assert 'it comes from the loss itself' in text
    assert "No pixel of 'source' has a label." in text
    assert 'No pixel' not in described(model, tmp_path)


def test_guard_names_weights(tmp_path):
    model = build()
    trainer = Trainer(model, NaNGuardHook(), tmp_path)
    with torch.no_grad():
        model.segmentor.decode_head.conv_seg.bias[2] = NAN
    with pytest.raises(NonFiniteError, match=(
            'Weights are not finite already: '
            'segmentor.decode_head.conv_seg.bias, '
            'teachers.ema.model.decode_head.conv_seg.bias.')):
        trainer.train(batch())


def test_guard_refuses_spoilt_weights(tmp_path):
    model = build()
    model.segmentor.backbone.layers[1][1].running_var[0] = NAN
    with pytest.raises(ValueError, match='1 weights are not finite before '
                       "training, the first is "
                       "'segmentor.backbone.layers.1.1.running_var'"):
        Trainer(model, NaNGuardHook(), tmp_path)
    # an infinite buffer may be a mask
    model = build()
    model.segmentor.backbone.register_buffer('mask', torch.tensor(-INF))
    model = build(model.segmentor, **dacs_parts())
    Trainer(model, NaNGuardHook(), tmp_path).train(batch())


class HiddenNaN(torch.autograd.Function):
    """Finite, with a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * NAN


@pytest.mark.parametrize('way', [HOST, FUSED])
def test_guard_sees_gradients_of_a_finite_loss(tmp_path, way):
    model = build()
    real = model.segmentor.decode_head.cls_seg
    trainer = Trainer(model, NaNGuardHook(), tmp_path,
                      wrapper_of(model, way)).train(batch())
    before = weights_of(model.segmentor)
    model.segmentor.decode_head.cls_seg = lambda x: real(HiddenNaN.apply(x))
    words = 'all losses are finite, but gradients are not'
    if way == HOST:
        words += ' .the first of segmentor.backbone.layers.0.0.weight'
    with pytest.raises(NonFiniteError, match=words):
        trainer.train(batch(seed=1), batch(seed=1))
    assert moved(before, weights_of(model.segmentor), but=['running']) == []


def test_guard_without_gradients_or_clues(tmp_path):
    model = build()
    real = model.segmentor.decode_head.cls_seg
    model.segmentor.decode_head.cls_seg = lambda x: real(HiddenNaN.apply(x))
    hook = NaNGuardHook(check_gradients=False, locate=False)
    trainer = Trainer(model, hook, tmp_path).train(batch())
    assert finite.broken_weights(model)  # as asked for
    assert not model.keep_step
    model = build()
    text = described(model, tmp_path, images(), locate=False)
    assert "on 'source'. Images of the stream 'source'" in text
    assert trainer.iter == 1


def test_guard_on_a_stock_segmentor(tmp_path):
    torch.manual_seed(0)
    model = MODELS.build(tiny_student())
    data = batch()
    plain = dict(inputs=data['inputs']['source'],
                 data_samples=data['data_samples']['source'])
    trainer = Trainer(model, NaNGuardHook(), tmp_path).train(plain)
    before = weights_of(model)
    bad = images()
    with pytest.raises(NonFiniteError, match=(
            'Iteration 2: decode.loss_ce is nan. Images are not finite as '
            'loaded: source/broken.png. The batch is in')):
        trainer.train(dict(inputs=bad['inputs']['source'],
                           data_samples=bad['data_samples']['source']))
    assert moved(before, weights_of(model), but=['running']) == []
    decode = model.decode_head.loss_decode.forward
    model.decode_head.loss_decode.forward = lambda *args, **options: (
        decode(*args, **options) * NAN)
    for part in model.modules():
        if hasattr(part, 'reset_running_stats'):
            part.reset_running_stats()
    assert 'it comes from the net or from the loss.' in described(
        model, tmp_path, plain)


# -- the file --------------------------------------------------------------


def test_guard_saves_the_batch(tmp_path):
    model = build()
    data = images('target')
    data['data_samples']['source'][0].set_metainfo(dict(scale=(2., 3.)))
    text = described(model, tmp_path, data)
    path = tmp_path / 'nan_guard' / 'iter_000001_rank0.pt'
    assert text.endswith(f' The batch is in {path}.')
    saved = torch.load(path, weights_only=True)
    assert saved['iteration'] == 0 and saved['seed'] == 3
    assert saved['rank'] == 0 and saved['world_size'] == 1
    assert text.startswith(saved['message'])
    assert saved['paths'] == dict(source=['none.png'] * 2, target=[
        'none.png', 'target/broken.png'])
    assert saved['not_finite']['images target'] != 0
    assert 'images source' not in saved['not_finite']
    labels = saved['data_samples']['source'][0]['data']['gt_sem_seg']
    want = data['data_samples']['source'][0]
    assert torch.equal(labels['data']['data'], want.gt_sem_seg.data)

    again = load_batch(path)
    for stream, mine in again['inputs'].items():
        for one, other in zip(mine, data['inputs'][stream], strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
    sample = again['data_samples']['source'][0]
    assert sample.metainfo == want.metainfo
    assert torch.equal(sample.gt_sem_seg.data, want.gt_sem_seg.data)
    # the same iteration again
    model = build()
    losses = model(**model.data_preprocessor(again, True), mode='loss')
    assert losses['source.decode.loss_ce'].isfinite()
    assert saved['not_finite'].keys() >= {
        f'loss {key}' for key, value in losses.items()
        if 'loss' in key and not value.isfinite()}


def test_guard_saves_few_files(tmp_path, log):
    hook = NaNGuardHook(action='skip', max_files=2)
    Trainer(build(), hook, tmp_path).train(*[images()] * 4)
    assert len(list(tmp_path.rglob('*.pt'))) == 2
    assert len(log) == 4 and 'The batch is in' not in log[-1][1]
    hook = NaNGuardHook(action='skip', max_files=0)
    Trainer(build(), hook, tmp_path / 'none').train(images())
    assert not (tmp_path / 'none').exists()


# -- steps that are left out -----------------------------------------------


@pytest.mark.parametrize('way', [HOST, FUSED, SCALER])
def test_guard_skips_exactly(tmp_path, log, way):
    """Weights, moments and statistics are those without the iteration."""
    def trained(batches, seed=0):
        model = build(tiny_student(dropout=.5))
        model.teachers['ema'].batch_norm = 'batch'
        trainer = Trainer(model, NaNGuardHook(action='skip'), tmp_path,
                          wrapper_of(model, way))
        trainer.train(*batches)
        trainer.hook.after_train(trainer)
        return trainer

    bad = images()
    one = trained([batch(), bad])
    two = trained([batch()])
    assert one.hook.skipped == 1 and two.hook.skipped == 0
    # the teacher has followed once more, and the clocks have ticked
    assert moved(weights_of(two.model), weights_of(one.model),
                 but=['teachers.ema.model']) == []
    teacher = one.model.teachers['ema'].model
    assert finite.broken_weights(teacher) == []
    for mine, theirs in zip(
            one.optim_wrapper.optimizer.state.values(),
            two.optim_wrapper.optimizer.state.values(), strict=True):
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key
    assert [level for level, _ in log] == [logging.WARNING]
    assert log[0][1].endswith('This update is left out.')
    before = weights_of(one.model.segmentor)
    one.hook.before_train(one)
    one.train(batch(seed=2))
    assert len(moved(before, weights_of(one.model.segmentor))) > 8
    assert finite.broken_weights(one.model) == []


@pytest.mark.parametrize('way', [HOST, FUSED])
def test_guard_gives_up(tmp_path, log, way):
    model = build()
    hook = NaNGuardHook(action='skip', max_skips=2)
    trainer = Trainer(model, hook, tmp_path, wrapper_of(model, way))
    good, bad = batch(), images()
    trainer.train(bad, bad, good, bad, bad, good, good)
    assert hook.skipped == 4
    with pytest.raises(NonFiniteError, match='3 updates in a row were left '
                       'out, more than NaNGuardHook.max_skips = 2'):
        trainer.train(bad, bad, bad, good)
    assert finite.broken_weights(model) == []


@pytest.mark.parametrize('way', [HOST, FUSED, SCALER])
def test_guard_with_accumulated_gradients(tmp_path, log, way):
    """An update of which one part is bad is left out, and counted once."""
    model = build()
    wrapper = wrapper_of(model, way, accumulative_counts=3)
    wrapper.initialize_count_status(model, 0, 100)
    hook = NaNGuardHook(action='skip', max_skips=1)
    trainer = Trainer(model, hook, tmp_path, wrapper)
    start = weights_of(model.segmentor)
    trainer.train(batch(), images(), batch(), batch())
    assert moved(start, weights_of(model.segmentor), but=['running']) == []
    assert finite.broken_weights(model) == []
    assert hook.skipped == 1
    assert len(log) == 1 and 'Iteration 2: ' in log[0][1]
    trainer.train(batch(seed=1), batch(seed=2), batch(seed=3))
    assert hook.skipped == 1
    assert moved(start, weights_of(model.segmentor), but=['running'])
    assert finite.broken_weights(model) == []
    with pytest.raises(NonFiniteError, match='2 updates in a row'):
        trainer.train(*[images(), batch(), batch()] * 3)


def test_guard_leaves_overflows_to_the_scaler(tmp_path):
    """Infinite gradients of finite losses are normal with a scale."""
    model = build()
    wrapper = wrapper_of(model, SCALER)
    start = weights_of(model.segmentor)
    real = model.segmentor.decode_head.cls_seg
    model.segmentor.decode_head.cls_seg = lambda x: real(HiddenNaN.apply(x))
    trainer = Trainer(model, NaNGuardHook(), tmp_path, wrapper)
    trainer.train(batch(), batch())
    assert moved(start, weights_of(model.segmentor), but=['running']) == []
    assert wrapper.loss_scaler.get_scale() == 1.


def test_guard_leaves_out_a_scaled_step_of_finite_gradients(tmp_path, log):
    """A loss that is infinite by a constant."""
    model = build()
    wrapper = wrapper_of(model, SCALER)
    trainer = Trainer(model, NaNGuardHook(action='skip'), tmp_path, wrapper)
    loss = model.objectives['source'].forward
    model.objectives['source'].forward = lambda step: {
        key: value + INF for key, value in loss(step).items()}
    start = weights_of(model.segmentor)
    trainer.train(batch(), batch())
    assert moved(start, weights_of(model.segmentor), but=['running']) == []
    assert trainer.hook.skipped == 1  # the second is still on its way


@pytest.mark.parametrize('way', [FUSED, SCALER])
def test_guard_never_waits(tmp_path, monkeypatch, way):
    """But for numbers of the iteration before, which have arrived."""
    model = build()
    hook = NaNGuardHook(action='skip')
    trainer = Trainer(model, hook, tmp_path, wrapper_of(model, way))
    trainer.train(batch())
    reads = ('item', 'tolist', '__bool__', '__float__', '__int__',
             '__index__', 'nonzero')
    judged = []

    def no_waiting(real):
        def checked(*args, **options):
            with monkeypatch.context() as patch:
                for name in reads:
                    def read(self, name=name):
                        raise AssertionError(f'Tensor.{name} waits')
                    patch.setattr(torch.Tensor, name, read)
                return real(*args, **options)
        return checked

    monkeypatch.setattr(hook, '_judge', lambda runner, record: judged.append(
        record.iteration))
    for name in ('before_train_iter', '_watch', '_settle',
                 'after_train_iter'):
        monkeypatch.setattr(hook, name, no_waiting(getattr(hook, name)))
    trainer.train(images(), batch(), batch())
    assert judged == [0, 1, 2]
    with pytest.raises(AssertionError, match='Tensor.item waits'):
        no_waiting(lambda: torch.ones(1).item())()


def test_guard_ways():
    model = torch.nn.Linear(2, 2)
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    for way, device, skip, want in (
            (HOST, cpu, False, HOST), (HOST, cpu, True, HOST),
            (HOST, cuda, False, LATE), (HOST, cuda, True, HOST),
            (FUSED, cuda, False, FUSED), (FUSED, cuda, True, FUSED),
            (SCALER, cuda, False, SCALER), (SCALER, cuda, True, SCALER)):
        assert way_of(wrapper_of(model, way), device, skip) == want


def test_guard_saves_no_spoilt_weights(tmp_path, monkeypatch):
    """Where the step was taken nothing is saved or validated."""
    monkeypatch.setattr(nan_guard, 'way_of', lambda *args: LATE)
    for ask in ('before_val', 'before_save_checkpoint', 'after_train'):
        model = build()
        hook = NaNGuardHook()
        trainer = Trainer(model, hook, tmp_path).train(batch(), images())
        assert finite.broken_weights(model)
        arguments = [{}] if ask == 'before_save_checkpoint' else []
        with pytest.raises(NonFiniteError, match='the weights in memory are '
                           'spoilt, no checkpoint is'):
            getattr(hook, ask)(trainer, *arguments)
    model = build()
    hook = NaNGuardHook()
    trainer = Trainer(model, hook, tmp_path)
    trainer.hooks = [CheckpointHook(interval=2, by_epoch=False)]
    trainer.train(batch())
    with pytest.raises(NonFiniteError):  # all ranks, before the first saves
        trainer.train(images())
    with pytest.raises(NonFiniteError):
        Trainer(build(), NaNGuardHook(), tmp_path).train(
            batch(), images(), batch())


# -- what it leaves alone --------------------------------------------------


@pytest.mark.parametrize('way', [HOST, FUSED, SCALER])
@pytest.mark.parametrize('action', ['stop', 'skip'])
def test_guard_changes_nothing(tmp_path, way, action):
    batches = [batch(seed=i) for i in range(3)]
    watched = build(tiny_student(dropout=.5))
    trainer = Trainer(watched, NaNGuardHook(action=action), tmp_path,
                      wrapper_of(watched, way)).train(*batches)
    trainer.hook.after_train(trainer)
    model = build(tiny_student(dropout=.5))
    wrapper = wrapper_of(model, way)
    for data, mine in zip(batches, trainer.outputs, strict=True):
        theirs = model.train_step(data, wrapper)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    after = weights_of(watched)
    for key, value in weights_of(model).items():
        assert torch.equal(value, after[key]), key
    # and stands aside
    assert 'step' not in vars(trainer.optim_wrapper)
    assert 'parse_losses' not in vars(watched)
    assert not hasattr(trainer.optim_wrapper.optimizer, 'found_inf')
    assert not list(tmp_path.rglob('*.pt'))


def test_guard_keeps_no_step_but_for_others(tmp_path):
    model = build()
    trainer = Trainer(model, NaNGuardHook(), tmp_path).train(batch())
    assert model.last_step is None and not model.keep_step
    model.keep_step = True  # as a hook before this one asks
    trainer.train(batch())
    assert model.last_step is not None and model.keep_step
    copy.deepcopy(model)  # without the hook and its optimizer


def test_guard_of_one_backward_after_the_other(tmp_path, log):
    """Losses come in groups there, and the step after the last."""
    def model_of():
        return build(tiny_student(), backward='sequential', **dacs_parts())

    model = model_of()
    trainer = Trainer(model, NaNGuardHook(), tmp_path).train(batch())
    before = weights_of(model)
    with pytest.raises(NonFiniteError, match=(
            "mixed.decode.loss_ce is nan, on 'mixed_strong'. Images of the "
            "view 'mixed_strong' are not finite.")):
        spoil(model.views['mixed_strong'],
              lambda view: view.images[0, 0].fill_(INF))
        trainer.train(batch(seed=1))
    assert moved(before, weights_of(model), but=['running', 'teach']) == []

    model = model_of()
    hook = NaNGuardHook(action='skip')
    trainer = Trainer(model, hook, tmp_path).train(batch(), images())
    assert hook.skipped == 1 and finite.broken_weights(model) == []
    assert not model.keep_step and model.last_step is None


def test_guard_restores_a_buffer_that_a_head_replaces(tmp_path, log):
    """As mmseg's EMAHead does with its bases."""
    model = build()
    head = model.segmentor.decode_head
    head.register_buffer('bases', torch.ones(3))
    real = head.forward

    def forward(inputs):
        if head.training:
            head.bases = head.bases + inputs[-1].sum().detach()
        return real(inputs)

    head.forward = forward
    model = build(model.segmentor, **dacs_parts())
    trainer = Trainer(model, NaNGuardHook(action='skip'), tmp_path)
    trainer.train(batch())
    before = head.bases.clone()
    assert not torch.equal(before, torch.ones(3))
    trainer.train(images())
    assert torch.equal(head.bases, before)


def test_guard_refuses_wrong_arguments(tmp_path):
    for options, words in (
            (dict(action='warn'), "must be 'stop' or 'skip', got 'warn'"),
            (dict(max_skips=0), 'NaNGuardHook.max_skips in custom_hooks'),
            (dict(max_files=-1), 'NaNGuardHook.max_files in custom_hooks')):
        with pytest.raises(ValueError, match=words):
            NaNGuardHook(**options)
    model = build()
    both = OptimWrapperDict(one=wrapper_of(model))
    with pytest.raises(ValueError, match='knows one optimizer'):
        Trainer(model, NaNGuardHook(), tmp_path, both)


def test_guard_says_one_sentence(capsys):
    with pytest.raises(SystemExit), one_sentence():
        raise NonFiniteError('Iteration 3: loss is nan.')
    assert capsys.readouterr().err.startswith(
        'error: Iteration 3: loss is nan.')


def test_guard_batch_of_several_images_a_position(tmp_path):
    data = images()
    for stream, one in data['inputs'].items():
        data['inputs'][stream] = [one[:1], one[1:]]
        samples = data['data_samples'][stream]
        data['data_samples'][stream] = [samples[:1], samples[1:]]
    text = described(build(), tmp_path, data)
    assert 'as loaded: source/broken.png.' in text


# -- several ranks, a whole run --------------------------------------------

def train_on_a_rank(folder):
    """Good batches, but for one of the second rank; result in a file."""
    rank = torch.distributed.get_rank()

    def trainer(way, name, **options):
        model = build()
        wrapper = wrapper_of(model, way)
        return Trainer(MMDistributedDataParallel(model),
                       NaNGuardHook(**options), folder / name, wrapper)

    result = {}
    odd = images() if rank else batch(seed=4)
    for way in (HOST, FUSED):
        run = trainer(way, way).train(batch(seed=rank))
        try:
            run.train(odd, batch(seed=rank))
        except NonFiniteError as error:
            result[way] = [run.iter, str(error)]
        run = trainer(way, way + 'skip', action='skip')
        run.train(batch(seed=rank), odd, batch(seed=rank + 5))
        run.hook.after_train(run)
        result[way + 'skip'] = [
            run.hook.skipped, weights_of(run.model.module)]
    torch.save(result, folder / f'rank{rank}.pth')


def test_guard_decides_alike_on_two_ranks(tmp_path):
    on_ranks(train_on_a_rank, tmp_path)
    one, two = (torch.load(tmp_path / f'rank{r}.pth', weights_only=True)
                for r in range(2))
    for way in (HOST, FUSED):
        # both in the same iteration, the one with the batch says more
        assert one[way][0] == two[way][0] == (1 if way == HOST else 2)
        assert one[way][1] == ('Iteration 2: a loss or an image is not '
                               'finite on another rank, which names it.')
        assert "source.decode.loss_ce is nan, on 'source'" in two[way][1]
        folder = tmp_path / way / 'nan_guard'
        assert [file.name for file in folder.iterdir()] == [
            'iter_000002_rank1.pt']
        (skipped, mine), (other, theirs) = (
            one[way + 'skip'], two[way + 'skip'])
        assert skipped == other == 1
        for key, value in mine.items():
            assert value.isfinite().all(), key
            if 'running' not in key:
                assert torch.equal(theirs[key], value), key


def quickstart(work_dir, **changes):
    config = Config.fromfile(str(ROOT / 'configs/quickstart/uda.py'))
    config.model.segmentor = tiny_student(10)
    config.data_preprocessor = config.model.segmentor.data_preprocessor
    config.merge_from_dict({
        'train_cfg.max_iters': 4, 'train_cfg.val_interval': 100,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.logger.interval': 1, 'randomness': dict(seed=3),
        'work_dir': str(work_dir),
        'experiment_name': f'{work_dir.parent.name}_{work_dir.name}',
        **changes})
    loader = config.train_dataloader
    loader.batch_size, loader.num_workers = 2, 0
    loader.persistent_workers = False
    crop = dict(type='RandomCrop', crop_size=(32, 32))
    loader.dataset = dict(type='StreamDataset', streams=dict(
        source=dict(dataset=streets('source', 6, crop)),
        target=dict(labelled=False, dataset=streets('target', 6, crop))))
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    return Runner.from_cfg(config)


def test_guard_in_a_run_of_the_shipped_configs(tmp_path, monkeypatch):
    """It is in the default runtime, and the last good checkpoint resumes."""
    # mmengine spends 5 s on the layout of a config wherever it writes one
    monkeypatch.setattr(Config, 'pretty_text', property(lambda _: 'x = 1'))
    runner = quickstart(tmp_path / 'run')
    assert 'NaNGuardHook' in [type(one).__name__ for one in runner.hooks]
    real = runner.model.data_preprocessor.forward

    def forward(data, training=False):
        result = real(data, training)
        if runner.iter == 2:  # a normalisation that divides by 0
            result['inputs']['target'][0] = INF
        return result

    runner.model.data_preprocessor.forward = forward
    with pytest.raises(NonFiniteError, match=(
            "Iteration 3: .*Images of the view 'target' are not finite.")):
        runner.train()
    saved = sorted(one.name for one in (tmp_path / 'run').glob('*.pth'))
    assert saved == ['iter_2.pth']
    again = quickstart(tmp_path / 'run', resume=True)
    again.train()
    assert again.iter == 4
    assert finite.broken_weights(again.model) == []
