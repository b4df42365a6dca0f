"""MiT with fused attention: mmseg's numbers in less memory."""

import copy

import pytest
import torch
from mmseg.models.backbones.mit import EfficientMultiheadAttention
from mmseg.registry import MODELS
from torch.nn import functional as F

from helpers import build, dacs_parts, tiny_student
from mmseg_contrast.models.mit import SDPAttention

TINY = dict(embed_dims=8, num_layers=(2, 1, 1, 1), num_heads=(1, 2, 5, 8))


def net(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return MODELS.build(dict(type=kind, **{**TINY, **options})).to(dtype)


def images(dtype=torch.float32, samples=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 64, 96, generator=generator).to(dtype)


def outputs_and_gradients(model, inputs):
    torch.manual_seed(2)
    found = list(model(inputs))
    weights = [torch.randn(one.shape, generator=torch.Generator()
                           .manual_seed(3)).to(one) for one in found]
    sum((a * b).mean() for a, b in zip(found, weights, strict=True)).backward()
    return ([one.detach() for one in found],
            [one.grad for one in model.parameters()])


def largest_difference(first, second):
    return max(float(((a - b).abs().max() / b.abs().max().clamp_min(1))
                     .detach())
               for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('options', [
    dict(), dict(qkv_bias=False), dict(with_cp=True),
    dict(attn_drop_rate=0.3), dict(drop_path_rate=0.5)], ids=str)
@pytest.mark.parametrize('dtype,close', [(torch.float32, 1e-5),
                                         (torch.float64, 1e-12)], ids=str)
def test_outputs_and_gradients_are_those_of_mmseg(dtype, close, options):
    """With the same draws, too: dropout has the same place and size."""
    stock, ours = (net(kind, dtype, **options).train() for kind in (
        'MixVisionTransformer', 'SDPAMixVisionTransformer'))
    wanted, found = (outputs_and_gradients(one, images(dtype))
                     for one in (stock, ours))
    assert largest_difference(found[0], wanted[0]) <= close
    assert largest_difference(found[1], wanted[1]) <= close


def test_names_and_initial_weights_are_those_of_mmseg():
    stock, ours = (net(kind) for kind in (
        'MixVisionTransformer', 'SDPAMixVisionTransformer'))
    theirs, mine = stock.state_dict(), ours.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ours.load_state_dict(theirs, strict=True)


def test_every_attention_is_fused_and_none_is_asked_for_its_weights(
        monkeypatch):
    called = []
    fused = F.scaled_dot_product_attention

    def count(query, key, value, dropout_p=0.):
        called.append(dropout_p)
        return fused(query, key, value, dropout_p=dropout_p)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', count)
    model = net('SDPAMixVisionTransformer', attn_drop_rate=0.3)
    blocks = [one for one in model.modules()
              if isinstance(one, EfficientMultiheadAttention)]
    assert len(blocks) == 5
    assert all(type(one) is SDPAttention for one in blocks)
    model.train()(images())
    assert called == [0.3] * 5
    called.clear()
    model.eval()(images())
    assert called == [0.] * 5


def test_checkpoints_compute_a_block_again_and_keep_its_dropout():
    plain, ours = (net('SDPAMixVisionTransformer', torch.float64,
                       with_cp=with_cp, drop_path_rate=0.5, drop_rate=0.2,
                       attn_drop_rate=0.2).train()
                   for with_cp in (False, True))
    runs = []
    for one in (plain, ours):
        for module in one.modules():
            if isinstance(module, SDPAttention):
                module.register_forward_hook(
                    lambda *args, one=one: runs.append(one))
    wanted, found = (outputs_and_gradients(one, images(torch.float64))
                     for one in (plain, ours))
    assert runs.count(plain) == 5 and runs.count(ours) == 10
    assert largest_difference(found[0], wanted[0]) == 0
    assert largest_difference(found[1], wanted[1]) <= 1e-15
    runs.clear()
    with torch.no_grad():
        ours(images(torch.float64))
    assert len(runs) == 5


def kept_for_backward(model):
    """Shapes of what autograd keeps."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        model(images())
    return shapes


def test_no_map_of_attention_weights_is_kept():
    # Stage 1 has 16 * 24 tokens that look at 2 * 3 reduced ones, and so on:
    # stage 4 has 2 * 3 of each.
    maps = {(384, 6), (96, 6), (24, 6), (6, 6)}

    def has_map(kind):
        return any(shape[-2:] in maps
                   for shape in kept_for_backward(net(kind).train()))

    assert has_map('MixVisionTransformer')
    assert not has_map('SDPAMixVisionTransformer')


@pytest.mark.parametrize('kind', ['SDPAMixVisionTransformer',
                                  'ReferenceMixVisionTransformer'])
def test_a_copy_computes_the_same_and_is_no_alias(kind):
    model = net(kind).eval()
    other = copy.deepcopy(model)
    assert torch.equal(model(images())[-1], other(images())[-1])
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(model(images())[-1], other(images())[-1])


def test_the_published_norms_are_on_top_of_fused_attention():
    model = net('ReferenceMixVisionTransformer', drop_path_rate=0.)
    block = model.layers[0][1][0].attn
    assert type(block) is SDPAttention
    assert block.norm.eps == 1e-5 and model.layers[0][0].norm.eps == 1e-5
    assert model.layers[0][1][0].norm1.eps == 1e-6
    stock = net('MixVisionTransformer')
    stock.load_state_dict(model.state_dict())
    for name, module in stock.named_modules():
        if name.endswith(('.attn.norm', '0.norm')):
            module.eps = 1e-5
    wanted = stock.eval()(images())
    assert largest_difference(model.eval()(images()), wanted) <= 1e-5


def test_student_and_teacher_of_an_adapted_model_are_fused():
    stages = [8, 16, 40, 64]
    student = tiny_student(
        in_channels=stages, in_index=(0, 1, 2, 3), type='SegformerHead')
    for key in ('num_convs', 'concat_input'):
        student['decode_head'].pop(key)
    student['backbone'] = dict(type='SDPAMixVisionTransformer', **TINY)
    model = build(student, **dacs_parts())
    for one in (model.segmentor, model.teachers['ema'].model):
        assert type(one.backbone.layers[0][1][0].attn) is SDPAttention
