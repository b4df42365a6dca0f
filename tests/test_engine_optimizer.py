import copy

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.utils import digit_version
from mmseg.registry import MODELS
from torch import nn

from mmseg_contrast.engine.optimizer import (
    add_parameters,
    describe_groups,
    drop_frozen,
    merge_groups,
    start_momentum,
    use_fused,
)

UDA = 'UDAOptimWrapperConstructor'


@pytest.fixture(autouse=True)
def mmseg_scope():
    init_default_scope('mmseg')


class Student(nn.Module):
    """Eight tensors to train, one frozen."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.decode_head = nn.Sequential(nn.Conv2d(4, 2, 1))
        self.frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)

    def forward(self, images):
        return self.decode_head(self.backbone(images))


class Model(nn.Module):
    """The parts of a UDASegmentor that an optimizer sees."""

    def __init__(self):
        super().__init__()
        self.segmentor = Student()
        self.teachers = nn.ModuleDict(dict(ema=Student()))
        self.objectives = nn.ModuleDict(dict(project=nn.Linear(2, 2)))
        self.state = nn.ModuleDict(dict(bank=nn.Linear(3, 1, bias=False)))

    def forward(self, images):
        logits = self.segmentor(images).mean((2, 3))
        return self.objectives['project'](logits).pow(2).sum() + self.state[
            'bank'](images.mean((2, 3))).pow(2).sum()


def config(paramwise=None, **more):
    cfg = dict(
        type='OptimWrapper',
        constructor=UDA,
        optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1),
        **more)
    if paramwise is not None:
        cfg['paramwise_cfg'] = paramwise
    return cfg


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group['params']]


def test_custom_keys_see_plain_names_and_equal_groups_merge():
    torch.manual_seed(0)
    model = Model()
    paramwise = dict(
        norm_decay_mult=0.,
        # Matches at the start of a name only if the prefix is gone.
        custom_keys={'decode_head.0': dict(lr_mult=10.)})
    # Stock behaviour first: one group per tensor.
    stock = build_optim_wrapper(
        model.segmentor, config(paramwise) | dict(
            constructor='DefaultOptimWrapperConstructor'))
    assert len(stock.optimizer.param_groups) == 8

    wrapper = build_optim_wrapper(model, config(paramwise))
    rows = [(g['lr'], g['weight_decay'], len(g['params']))
            for g in wrapper.optimizer.param_groups]
    assert rows == [(0.01, 0.1, 7), (0.01, 0., 2), (0.1, 0.1, 2)]
    assert names_of(model, wrapper.optimizer.param_groups[0]) == [
        'segmentor.backbone.0.weight', 'segmentor.backbone.0.bias',
        'segmentor.backbone.2.weight', 'segmentor.backbone.2.bias',
        'objectives.project.weight', 'objectives.project.bias',
        'state.bank.weight'
    ]
    assert names_of(model, wrapper.optimizer.param_groups[1]) == [
        'segmentor.backbone.1.weight', 'segmentor.backbone.1.bias'
    ]
    assert names_of(model, wrapper.optimizer.param_groups[2]) == [
        'segmentor.decode_head.0.weight', 'segmentor.decode_head.0.bias'
    ]


def test_prefix_is_really_gone():
    model = Model()
    paramwise = dict(custom_keys={'segmentor': dict(lr_mult=0.)})
    wrapper = build_optim_wrapper(model, config(paramwise))
    assert [g['lr'] for g in wrapper.optimizer.param_groups] == [0.01]


def test_without_paramwise_no_frozen_and_no_teacher_parameter():
    model = Model()
    wrapper = build_optim_wrapper(model, config())
    assert [len(g['params']) for g in wrapper.optimizer.param_groups] == [11]
    held = {id(p) for p in wrapper.optimizer.param_groups[0]['params']}
    assert id(model.segmentor.frozen.weight) not in held
    # The teacher of this toy has gradients on: it stays out by its place.
    assert all(p.requires_grad for p in model.teachers['ema'].decode_head[0]
               .parameters())
    assert not held & {id(p) for p in model.teachers.parameters()}


def test_reference_to_the_student_in_an_objective_is_not_added_twice():
    model = Model()
    model.objectives['again'] = model.segmentor.decode_head
    wrapper = build_optim_wrapper(model, config())
    assert [len(g['params']) for g in wrapper.optimizer.param_groups] == [11]


@pytest.mark.parametrize('optimizer', [
    dict(type='AdamW', lr=0.01, weight_decay=0.1),
    dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1),
])
def test_a_step_equals_that_of_the_unmerged_optimizer(optimizer):
    torch.manual_seed(0)
    merged_model = Model()
    stock_model = copy.deepcopy(merged_model)
    paramwise = dict(
        norm_decay_mult=0.,
        bias_lr_mult=2.,
        custom_keys={'decode_head': dict(lr_mult=10.)})
    cfg = config(paramwise)
    cfg['optimizer'] = optimizer
    merged = build_optim_wrapper(merged_model, copy.deepcopy(cfg))

    stock_cfg = cfg | dict(constructor='DefaultOptimWrapperConstructor')
    stock = build_optim_wrapper(stock_model.segmentor, stock_cfg)
    stock.optimizer.add_param_group(
        dict(params=[
            *stock_model.objectives.parameters(),
            *stock_model.state.parameters()
        ]))
    assert len(stock.optimizer.param_groups) == 9
    assert len(merged.optimizer.param_groups) == 4

    images = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        for model, wrapper in ((merged_model, merged), (stock_model, stock)):
            wrapper.update_params(model(images))
    for ours, theirs in zip(
            merged_model.parameters(), stock_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_layer_decay_of_mmseg_means_the_same():
    model = Model()
    vit = MODELS.build(
        dict(
            type='BEiT',
            img_size=(32, 32),
            patch_size=16,
            embed_dims=8,
            num_layers=2,
            num_heads=2,
            mlp_ratio=2,
            out_indices=(1, )))
    model.segmentor = nn.Module()
    model.segmentor.backbone = vit
    model.segmentor.decode_head = nn.Conv2d(8, 2, 1)
    paramwise = dict(num_layers=2, layer_decay_rate=0.5)
    wrapper = build_optim_wrapper(
        model,
        config(paramwise, base_constructor='LayerDecayOptimizerConstructor'))
    # The user's config is left as it was, the constructor renames a key.
    assert paramwise == dict(num_layers=2, layer_decay_rate=0.5)

    names = {id(p): n for n, p in model.named_parameters()}
    settings = {
        names[id(p)]: (g['lr'], g['weight_decay'])
        for g in wrapper.optimizer.param_groups
        for p in g['params']
    }
    # layer_id 0 (patch embedding), 1, 2 (blocks), 3 (head); 0.5 ** (3 - id)
    start = 'segmentor.backbone.'
    assert settings[f'{start}cls_token'] == (0.01 / 8, 0.1)
    assert settings[f'{start}patch_embed.projection.bias'] == (0.01 / 8, 0.)
    assert settings[f'{start}layers.0.attn.qkv.weight'] == (0.01 / 4, 0.1)
    assert settings[f'{start}layers.1.ln1.bias'] == (0.01 / 2, 0.)
    assert settings['segmentor.decode_head.weight'] == (0.01, 0.1)
    assert settings['segmentor.decode_head.bias'] == (0.01, 0.)
    # The rest of the model: base settings, so merged with nothing (layer
    # decay labels its groups).
    assert settings['objectives.project.bias'] == (0.01, 0.1)
    assert len(wrapper.optimizer.param_groups) == 9
    for group in wrapper.optimizer.param_groups:
        assert len(group['param_names']) == len(group['params'])
    trainable = sum(p.requires_grad for p in model.parameters())
    teachers = sum(p.requires_grad for p in model.teachers.parameters())
    assert len(settings) == trainable - teachers


def test_model_without_segmentor_is_the_student():
    student = Student()
    wrapper = build_optim_wrapper(
        student, config(dict(norm_decay_mult=0.)))
    assert [(g['weight_decay'], len(g['params']))
            for g in wrapper.optimizer.param_groups] == [(0.1, 6), (0., 2)]


def test_distributed_wrapper_is_taken_off():
    model = Model()
    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    wrapper = build_optim_wrapper(wrapped, config())
    assert [len(g['params']) for g in wrapper.optimizer.param_groups] == [11]


def test_frozen_student_is_refused():
    model = Model()
    model.segmentor.requires_grad_(False)
    with pytest.raises(ValueError, match='model.segmentor has no trainable'):
        build_optim_wrapper(model, config())


def test_merging_needs_a_fresh_optimizer():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1., momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match='before the first step'):
        merge_groups(optimizer)


def test_groups_of_other_settings_stay_apart():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(4)]
    optimizer = torch.optim.AdamW([
        dict(params=parameters[:1], betas=(0.9, 0.999), lr_mult=1.),
        dict(params=parameters[1:2], betas=[0.9, 0.999]),
        dict(params=parameters[2:3], betas=(0.9, 0.99)),
        dict(params=parameters[3:], lr=1.),
    ])
    merge_groups(optimizer)
    assert [len(g['params']) for g in optimizer.param_groups] == [2, 1, 1]
    # A note that isn't true of the whole group is dropped.
    assert 'lr_mult' not in optimizer.param_groups[0]


def test_frozen_parameters_leave_with_their_names():
    free, frozen, gone = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([
        dict(params=[('free', free), ('frozen', frozen)]),
        dict(params=[('gone', gone)])
    ], lr=1.)
    frozen.requires_grad_(False)
    gone.requires_grad_(False)
    drop_frozen(optimizer)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]['param_names'] == ['free']
    add_parameters(optimizer, [('new', nn.Parameter(torch.ones(2)))])
    merge_groups(optimizer)
    assert optimizer.param_groups[0]['param_names'] == ['free', 'new']
    assert describe_groups(optimizer).splitlines()[2].split() == [
        '1', '0', '2', '3'
    ]


def test_stock_layer_decay_on_the_wrapper_is_refused():
    from mmseg_contrast.engine.optimizer import refuse_layer_decay_on_wrapper
    wrapped = nn.ModuleDict(dict(segmentor=nn.Linear(1, 1)))
    wrapped.segmentor = wrapped['segmentor']
    cfg = dict(optim_wrapper=dict(
        constructor='LayerDecayOptimizerConstructor'))
    with pytest.raises(ValueError, match='base_constructor'):
        refuse_layer_decay_on_wrapper(cfg, wrapped)
    refuse_layer_decay_on_wrapper(cfg, nn.Linear(1, 1))
    refuse_layer_decay_on_wrapper({}, wrapped)
    refuse_layer_decay_on_wrapper(
        dict(optim_wrapper=dict(constructor='UDAOptimWrapperConstructor')),
        wrapped)


def after_steps(model, wrapper, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        wrapper.update_params(model(
            torch.randn(2, 3, 6, 6, generator=generator)))
    return [p.detach().clone() for p in model.parameters()]


def built(seed=0, **more):
    torch.manual_seed(seed)
    model = Model()
    return model, build_optim_wrapper(model, config(**more))


def test_fused_auto_changes_nothing_on_the_cpu():
    results = []
    for more in (dict(), dict(fused='auto'), dict(fused=False)):
        model, wrapper = built(**more)
        assert not wrapper.optimizer.defaults['fused']
        assert not any(g['fused'] for g in wrapper.optimizer.param_groups)
        results.append(after_steps(model, wrapper))
    for other in results[1:]:
        assert all(torch.equal(a, b)
                   for a, b in zip(results[0], other, strict=True))


needs_fused = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='torch has no fused AdamW on the CPU')


@needs_fused
def test_fused_if_it_is_asked_for_gives_the_same_steps():
    plain, fused = built(), built(fused=True)
    assert all(g['fused'] for g in fused[1].optimizer.param_groups)
    assert len(fused[1].optimizer.param_groups) == len(
        plain[1].optimizer.param_groups)
    names = [name for name, _ in plain[0].named_parameters()]
    for name, a, b in zip(names, after_steps(*fused), after_steps(*plain),
                          strict=True):
        # Before a batch norm a bias has no gradient but rounding, which
        # AdamW turns into steps.
        if name != 'segmentor.backbone.0.bias':
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class OnGPU:
    """What use_fused asks of a tensor."""

    is_cuda = True

    def __init__(self, floating=True):
        self.floating = floating

    def is_floating_point(self):
        return self.floating


def test_where_auto_is_fused():
    adam, on_gpu = dict(type='AdamW', lr=1e-3), [OnGPU(), OnGPU()]
    assert use_fused('auto', adam, on_gpu)
    assert use_fused('auto', dict(type=torch.optim.AdamW), on_gpu)
    assert not use_fused('auto', adam, [*on_gpu, torch.zeros(2)])
    assert not use_fused('auto', adam, [*on_gpu, OnGPU(floating=False)])
    assert not use_fused('auto', dict(type='Rprop'), on_gpu)
    assert not use_fused(False, adam, on_gpu)
    # The optimizer's own words count.
    for own in (dict(fused=False), dict(foreach=True)):
        assert not use_fused('auto', dict(adam, **own), on_gpu)
        assert not use_fused(True, dict(adam, **own), on_gpu)


def stepped(optimizer, grads, skip=()):
    """What the weight is after steps, of which some are left out."""
    weight, = optimizer.param_groups[0]['params']
    for i, grad in enumerate(grads):
        weight.grad = torch.full_like(weight, grad)
        if optimizer.param_groups[0].get('fused'):
            optimizer.found_inf = torch.tensor(float(i in skip))
            optimizer.step()
            del optimizer.found_inf
        elif i not in skip:
            optimizer.step()
    return weight.detach().clone()


@needs_fused
def test_a_first_step_of_fused_sgd_that_is_left_out_leaves_no_momentum(
        monkeypatch):
    # What uninitialised memory may hold.
    empty = torch.empty_like
    monkeypatch.setattr(torch, 'empty_like', lambda *args, **kwargs: empty(
        *args, **kwargs).fill_(1e6))
    found = []
    for fused in (True, False):
        for skip in ((), (0, ), (1, )):
            optimizer = torch.optim.SGD(
                [nn.Parameter(torch.ones(4))], lr=0.1, momentum=0.9,
                weight_decay=0.01, fused=fused)
            start_momentum(optimizer)
            assert len(optimizer.state) == fused
            found.append(stepped(optimizer, [1., -2., 3.], skip))
    for mine, theirs in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(found[0], found[1])
    wrapper = build_optim_wrapper(Model(), dict(
        config(fused=True), optimizer=dict(
            type='SGD', lr=0.1, momentum=0.9)))
    assert len(wrapper.optimizer.state) == 11
    # With dampening the first momentum isn't that of the equation.
    assert not use_fused('auto', dict(type='SGD', lr=1., dampening=0.1),
                         [OnGPU()])
    assert use_fused('auto', dict(type='SGD', lr=1., momentum=0.9), [OnGPU()])


@needs_fused
@pytest.mark.parametrize('before, after', [(False, True), (True, False)])
def test_a_resumed_optimizer_is_computed_as_its_own_config_says(
        before, after):
    first, saved = built(fused=before)
    after_steps(first, saved)
    weights, state = copy.deepcopy((first.state_dict(), saved.state_dict()))
    want = after_steps(first, saved)
    model, wrapper = built(seed=1, fused=after)
    model.load_state_dict(weights)
    wrapper.load_state_dict(state)
    assert all(bool(group['fused']) is after
               for group in wrapper.optimizer.param_groups)
    # As NaNGuardHook and a gradient scaler do it.
    if after:
        wrapper.optimizer.found_inf = torch.zeros(())
    found = after_steps(model, wrapper)
    for (name, _), a, b in zip(model.named_parameters(), found, want,
                               strict=True):
        if name != 'segmentor.backbone.0.bias':
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_moments_follow_weights_that_changed_their_layout():
    kept = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, wrapper = built()
        after_steps(model, wrapper)
        state = copy.deepcopy(wrapper.state_dict())
        weights = copy.deepcopy(model.state_dict())
        model, wrapper = built(seed=1)
        model.load_state_dict(weights)
        model.to(memory_format=layout)
        wrapper.load_state_dict(state)
        for p, moments in wrapper.optimizer.state.items():
            assert {one.stride() for one in moments.values()
                    if one.shape == p.shape} == {p.stride()}
        kept.append(after_steps(model, wrapper))
    for (name, _), mine, theirs in zip(model.named_parameters(), *kept,
                                       strict=True):
        if name != 'segmentor.backbone.0.bias':
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_mistakes_of_fused_are_named():
    with pytest.raises(ValueError, match="fused must be True, False or 'au"):
        built(fused='yes')
    with pytest.raises(ValueError, match="'Rprop' has no fused form"):
        use_fused(True, dict(type='Rprop'), [])
