"""DAFormer's decoder with its fusions, and DeepLabV2's head."""

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_contrast.models import DAFormerHead, DLV2Head
from mmseg_contrast.models.fusion import ISAFusion

WIDE = [4, 6, 8, 10]
NORM = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'))


def stages(batch=2, sides=(16, 8, 4, 2)):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(batch, wide, side, side, generator=gen)
            for wide, side in zip(WIDE, sides, strict=True)]


def head_with(**options):
    torch.manual_seed(0)
    return DAFormerHead(in_channels=WIDE, num_classes=5, channels=8,
                        embed_dims=6, dropout_ratio=0.0, **options).eval()


@pytest.mark.parametrize(('fusion', 'keys'), [
    (dict(type='ASPPFusion'),
     {'aspp_modules.0.conv.weight': (8, 24, 1, 1),
      'aspp_modules.3.depthwise_conv.conv.weight': (24, 1, 3, 3),
      'bottleneck.conv.weight': (8, 32, 3, 3)}),
    (dict(type='ASPPFusion', separable=False, dilations=(1, 6), pool=True),
     {'aspp_modules.1.conv.weight': (8, 24, 3, 3),
      'image_pool.1.conv.weight': (8, 24, 1, 1),
      'bottleneck.conv.weight': (8, 24, 3, 3)}),
    (dict(type='ISAFusion', isa_channels=4),
     {'in_conv.conv.weight': (8, 24, 1, 1),
      'global_relation.key_project.conv.weight': (4, 8, 1, 1),
      'local_relation.output_project.conv.weight': (8, 8, 1, 1)}),
    (dict(type='ConvFusion'), {'conv.weight': (8, 24, 1, 1)})])
def test_variants_have_the_published_names(fusion, keys):
    head = head_with(fusion=fusion)
    state = head.fuse_layer.state_dict()
    for key, shape in keys.items():
        assert tuple(state[key].shape) == shape, key
    assert 'embed_layers.3.proj.weight' in head.state_dict()
    assert head(stages()).shape == (2, 5, 16, 16)


def test_conv_variant_is_the_formula():
    """Embed, resize, concatenate, convolve, classify."""
    head = head_with(fusion=dict(type='ConvFusion'))
    features = stages()
    maps = []
    for index, stage in enumerate(features):
        layer = head.embed_layers[str(index)].proj
        one = torch.einsum('oc,nchw->nohw', layer.weight, stage)
        one = one + layer.bias.view(1, -1, 1, 1)
        maps.append(F.interpolate(one, (16, 16), mode='bilinear'))
    fused = head.fuse_layer.conv(torch.cat(maps, 1))
    fused = (fused / (1 + 1e-5)**0.5).relu()  # batch norm as initialised
    torch.testing.assert_close(
        head(features), head.conv_seg(fused), rtol=1e-5, atol=1e-6)


def test_interlaced_attention_groups():
    """First what is a tile apart, then inside of tiles, padding cut off."""
    fusion = ISAFusion(3, 3, **NORM, isa_channels=2, down_factor=(2, 3))
    fusion.in_conv = torch.nn.Identity()

    class Less(torch.nn.Module):
        """Stands for attention: the mean of the group is taken off."""

        def forward(self, maps):
            return maps - maps.mean((2, 3), keepdim=True)

    fusion.global_relation = fusion.local_relation = Less()
    maps = torch.randn(2, 3, 5, 7)
    found = fusion(maps)

    # 5 x 7 in tiles of 2 x 3: 6 x 9, one row below, one column left and right
    padded = F.pad(maps, (1, 1, 0, 1))
    result = padded.clone()
    for row in range(2):
        for column in range(3):
            group = padded[:, :, row::2, column::3]
            result[:, :, row::2, column::3] = group - group.mean(
                (2, 3), keepdim=True)
    padded, result = result, result.clone()
    for top in range(0, 6, 2):
        for left in range(0, 9, 3):
            group = padded[:, :, top:top + 2, left:left + 3]
            result[:, :, top:top + 2, left:left + 3] = group - group.mean(
                (2, 3), keepdim=True)
    torch.testing.assert_close(found, result[:, :, :5, 1:8])


def test_head_refuses_uneven_stages():
    with pytest.raises(ValueError, match='3 in_channels'):
        DAFormerHead(in_channels=WIDE[:3], num_classes=5)


def test_dlv2_is_a_sum_of_dilated_convolutions():
    head = DLV2Head(in_channels=10, num_classes=5, dilations=(6, 12))
    head.init_weights()
    features = stages(sides=(16, 16, 16, 16))
    wanted = 0
    for module, dilation in zip(head.aspp_modules, (6, 12), strict=True):
        wanted = wanted + F.conv2d(
            features[3], module.conv.weight, module.conv.bias,
            padding=dilation, dilation=dilation)
    torch.testing.assert_close(head(features), wanted)
    assert set(dict(head.named_parameters())) == {
        f'aspp_modules.{i}.conv.{kind}' for i in range(2)
        for kind in ('weight', 'bias')}
    assert 0.008 < head.aspp_modules[0].conv.weight.std() < 0.012


def test_pooled_branch_comes_first():
    """The mean over the image, resized, before the dilated branches."""
    fusion = head_with(fusion=dict(
        type='ASPPFusion', separable=False, dilations=(1, ), pool=True)
    ).fuse_layer
    maps = torch.randn(2, 24, 4, 4)
    pooled = fusion.image_pool(maps).expand(-1, -1, 4, 4)
    wanted = fusion.bottleneck(
        torch.cat([pooled, fusion.aspp_modules[0](maps)], 1))
    torch.testing.assert_close(fusion(maps), wanted)


def test_published_isa_sizes():
    fusion = ISAFusion(24, 16, **NORM)
    assert fusion.down_factor == (8, 8)
    assert fusion.global_relation.key_project.conv.weight.shape == (
        256, 16, 1, 1)


def test_arguments_arrive():
    head = head_with(ignore_index=7, align_corners=True)
    assert head.ignore_index == 7 and head.align_corners
    dlv2 = DLV2Head(in_channels=10, num_classes=2, align_corners=True,
                    ignore_index=7, out_channels=1, threshold=0.3)
    assert dlv2.align_corners and dlv2.ignore_index == 7
    assert dlv2(stages()).shape[1] == 1 and dlv2.threshold == 0.3
    mit = MODELS.build(dict(
        type='ReferenceMixVisionTransformer', embed_dims=8, num_stages=4,
        num_layers=(1, 1, 1, 1), with_cp=True, drop_rate=0.2,
        attn_drop_rate=0.3, pretrained='some.pth'))
    block = mit.layers[0][1][0]
    assert block.with_cp and block.attn.attn.dropout == 0.3
    assert block.attn.proj_drop.p == 0.2
    assert mit.init_cfg == dict(type='Pretrained', checkpoint='some.pth')
    with pytest.raises(ValueError, match='num_stages'):
        MODELS.build(dict(type='ReferenceMixVisionTransformer', num_stages=3))


@pytest.mark.parametrize('name', ['DAFormerHead', 'DLV2Head',
                                  'ReferenceMixVisionTransformer'])
def test_registered_for_mmseg(name):
    assert MODELS.get(name).__module__.startswith('mmseg_contrast')
