"""HRDA: two resolutions around any backbone and head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmseg.registry import MODELS
from torch import nn

from helpers import CLASSES, NORM, batch, build, dacs_parts, run, sample, total
from mmseg_contrast.adaptation.heads import MultiScaleHead, Target
from mmseg_contrast.adaptation.pseudo_labels.labels import Predictor
from mmseg_contrast.models import HRDAHead, HRDASegmentor, MultiScale

SIZE = (64, 64)
CROP = (32, 32)


@MODELS.register_module(force=True)
class PlainBackbone(nn.Module):
    """Two stages at strides 2 and 4, without a norm."""

    def __init__(self, channels=8):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, channels, 3, 2, 1),
                                    nn.Conv2d(channels, channels, 3, 2, 1)])
        self.calls = []

    def forward(self, images):
        self.calls.append(tuple(images.shape))
        stages = []
        for conv in self.convs:
            images = conv(images).relu()
            stages.append(images)
        return stages


FCN = dict(
    type='FCNHead', in_channels=8, in_index=1, channels=8, num_convs=1,
    concat_input=False, num_classes=CLASSES, norm_cfg=NORM, dropout_ratio=0.)
SEGFORMER = dict(
    type='SegformerHead', in_channels=[8, 8], in_index=[0, 1], channels=8,
    num_classes=CLASSES, norm_cfg=NORM, dropout_ratio=0.)
UPER = dict(
    type='UPerHead', in_channels=[8, 8], in_index=[0, 1], channels=8,
    pool_scales=(1, 2), num_classes=CLASSES, norm_cfg=NORM, dropout_ratio=0.)
SMALL = dict(channels=4, embed_dims=4)


def config(head=FCN, backbone='PlainBackbone', attention=SMALL, decode=None,
           **changes):
    return dict(dict(
        type='HRDASegmentor', backbone=dict(type=backbone),
        decode_head=dict(type='HRDAHead', head=copy.deepcopy(head),
                         attention=attention, **(decode or {})),
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[0.] * 3, std=[255.] * 3,
            size=SIZE),
        detail_size=CROP, train_cfg=dict(),
        test_cfg=ConfigDict(mode='whole')), **changes)


def segmentor(seed=0, **kwargs):
    torch.manual_seed(seed)
    net = MODELS.build(config(**kwargs))
    # Not the small initial weights, of which all logits would be alike.
    for name, parameter in net.named_parameters():
        if name.endswith('conv_seg.weight'):
            nn.init.normal_(parameter, std=0.7)
    return net


def images(samples=2, size=SIZE, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, *size, generator=gen)


def at_box(net, box):
    net.draw_box = lambda height, width, generator=None: box
    return net


def up(maps, size):
    return F.interpolate(maps, size, mode='bilinear', align_corners=False)


# What the two branches give


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('head', [FCN, SEGFORMER])
def test_attention_of_0_is_the_low_resolution_branch(head, training):
    net = segmentor(head=head, attention=0.).train(training)
    x = images()
    fused = net.decode_head(net.extract_feat(x))
    small = up(x, (32, 32))
    logits = net.decode_head.head(net.backbone(small))
    torch.testing.assert_close(fused, up(logits, fused.shape[-2:]))
    assert fused.shape[-1] == (16 if head is FCN else 32)


@pytest.mark.parametrize('box', [(0, 32, 0, 32), (8, 40, 32, 64)])
def test_attention_of_1_is_the_detail_inside_the_box(box):
    net = at_box(segmentor(attention=1.).train(), box)
    x = images()
    top, bottom, left, right = box
    crop = x[..., top:bottom, left:right]
    # Statistics of the batch: the norm sees the detail alone, as here.
    detail = net.decode_head.head(net.backbone(crop))
    context = up(net.decode_head.head(net.backbone(up(x, (32, 32)))),
                 (16, 16))
    fused = net.decode_head(net.extract_feat(x))
    cells = [edge // 4 for edge in box]
    # The attention's border is soft by one cell, but at the image's border.
    soft = [0 if edge in (0, 16) else 1 for edge in cells]
    rows = slice(cells[0] + soft[0], cells[1] - soft[1])
    columns = slice(cells[2] + soft[2], cells[3] - soft[3])
    inner = (slice(soft[0], 8 - soft[1]), slice(soft[2], 8 - soft[3]))
    torch.testing.assert_close(fused[..., rows, columns],
                               detail[(..., *inner)])
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[max(cells[0] - 1, 0):cells[1] + 1,
            max(cells[2] - 1, 0):cells[3] + 1] = False
    assert outside.sum() > 50
    torch.testing.assert_close(fused[..., outside], context[..., outside])
    assert not torch.allclose(fused[..., rows, columns],
                              context[..., rows, columns], atol=1e-3)


@pytest.mark.parametrize('classwise, channels', [(True, CLASSES), (False, 1)])
def test_gradients_reach_both_branches_and_the_attention(classwise, channels):
    net = at_box(segmentor(decode=dict(classwise=classwise)).train(),
                 (8, 40, 16, 48))
    features = net.extract_feat(images())
    stages = [*features.context, *features.detail[0]]
    for stage in stages:
        stage.retain_grad()
    outputs = net.decode_head.scales(features)
    assert outputs.attention.shape == (2, channels, 8, 8)
    assert 0 < outputs.attention.min() and outputs.attention.max() < 1
    assert outputs.attention.std() > 0
    # Each of the three by itself, not by way of another.
    weights = torch.randn(outputs.fused.shape)
    for part in torch.autograd.grad(
            outputs.fused, (outputs.context, outputs.detail,
                            outputs.attention), weights, retain_graph=True):
        assert part.abs().amax((0, 2, 3)).min() > 1e-3
    (outputs.fused * weights).sum().backward()
    for stage in (features.context[1], features.detail[0][1]):
        assert stage.grad.abs().sum() > 0
    for name, parameter in net.decode_head.scale_attention.named_parameters():
        if name != 'embed_layers.1.proj.bias':  # taken away by the norm
            assert parameter.grad.abs().max() > 1e-6, name


# Windows


def times_covered(net, height, width):
    """How many windows lie on each pixel."""
    count = torch.zeros(height, width, dtype=torch.long)
    for top, bottom, left, right in net.windows(height, width):
        assert 0 <= top and bottom <= height and 0 <= left and right <= width
        assert (bottom - top, right - left) == net.detail_size
        count[top:bottom, left:right] += 1
    return count


def test_windows_tile_the_image():
    net, tiles = segmentor(), segmentor(overlap=False)
    assert len(net.windows(64, 64)) == 9
    assert len(tiles.windows(64, 64)) == 4
    assert len(tiles.windows(72, 64)) == 6
    # Side by side: each pixel once. Half a window apart: the border of half
    # a window once in its direction, all else twice.
    assert (times_covered(tiles, 64, 64) == 1).all()
    assert (times_covered(tiles, 32, 128) == 1).all()
    once = torch.ones(64, dtype=torch.long)
    once[16:48] = 2
    assert torch.equal(times_covered(net, 64, 64),
                       once.unsqueeze(1) * once)
    for size in ((72, 64), (40, 96), (104, 56)):  # the last is moved back
        for one in (net, tiles):
            assert times_covered(one, *size).min() >= 1
    # Half of 24 is no multiple of 8.
    uneven = segmentor(detail_size=(24, 24)).windows(64, 64)
    assert all(edge % 8 == 0 for box in uneven for edge in box)


@pytest.mark.parametrize('size, crop', [((64, 64), (32, 32)),
                                        ((64, 96), (32, 16))])
@pytest.mark.parametrize('overlap', [True, False])
@pytest.mark.parametrize('samples', [1, 2])
def test_evaluation_equals_windows_one_by_one(samples, overlap, size, crop):
    net = segmentor(overlap=overlap, detail_size=crop).eval()
    x = images(samples, size)
    head = net.decode_head
    high, wide = crop
    tops, lefts = (range(0, side - length + 1, length // (1 + overlap))
                   for side, length in zip(size, crop, strict=True))
    with torch.no_grad():
        outputs = head.scales(net.extract_feat(x))
        total, count = torch.zeros(
            samples, CLASSES, *(side // 4 for side in size)), 0
        for top in tops:
            for left in lefts:
                part = x[..., top:top + high, left:left + wide]
                one = F.pad(head.head(net.backbone(part)), (
                    left // 4, (size[1] - wide - left) // 4,
                    top // 4, (size[0] - high - top) // 4))
                total = total + one
                count = count + (one != 0).all(1, keepdim=True).float()
        detail = total / count
        stages = net.backbone(up(x, tuple(side // 2 for side in size)))
        context = head.head(stages)
        attention = head.scale_attention(stages).sigmoid()
    torch.testing.assert_close(outputs.detail, detail)
    torch.testing.assert_close(outputs.context, context)
    torch.testing.assert_close(outputs.attention, attention)
    assert outputs.box is None
    torch.testing.assert_close(
        outputs.fused, up((1 - attention) * context, detail.shape[2:])
        + up(attention, detail.shape[2:]) * detail)


@pytest.mark.parametrize('rows', [1, 4, 7, 18])
def test_a_bound_on_windows_changes_no_result(rows):
    whole, bounded = segmentor(), segmentor(max_windows=rows)
    decoded = []
    bounded.decode_head.head.register_forward_hook(
        lambda module, args, output: decoded.append(len(output)))
    with torch.no_grad():
        want = whole.eval()(images())
        got = bounded.eval()(images())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    # 18 windows and the contexts of two images, which are first.
    encoded = [shape[0] for shape in bounded.backbone.calls]
    assert sum(encoded) == sum(decoded) == 20
    room = [min(rows, 20 - start) for start in range(0, 20, rows)]
    assert encoded == (room if rows > 2 else [2, *[1] * 18])
    assert decoded[0] == 2 and max(decoded[1:]) <= rows


def test_a_norm_that_sees_the_batch_sees_all_windows():
    net = segmentor(max_windows=4).eval()
    net.decode_head.head.train()
    seen = []
    net.decode_head.head.register_forward_hook(
        lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        net(images())
    assert seen == [2, 18]
    assert [shape[0] for shape in net.backbone.calls] == [4, 4, 4, 4, 4]
    net = segmentor(backbone='TinyBackbone', max_windows=4).eval()
    net.backbone.train()
    seen = []
    net.backbone.register_forward_hook(
        lambda module, args, output: seen.append(len(args[0])))
    with torch.no_grad():
        net(images())
    assert seen == [2, 18]


@pytest.mark.parametrize('size', [(64, 64), (50, 77), (20, 90), (9, 9)])
def test_predictions_have_the_images_size(size):
    net = segmentor().eval()
    x = images(1, size)
    with torch.no_grad():
        logits = net.predict(x)[0].seg_logits.data
        padded = F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8))
        want = net.predict(padded)[0].seg_logits.data
    assert logits.shape == (CLASSES, *size)
    torch.testing.assert_close(logits, want[:, :size[0], :size[1]])


def test_stock_slide_inference():
    net = segmentor(test_cfg=ConfigDict(
        mode='slide', crop_size=SIZE, stride=(32, 32))).eval()
    x = images(1, (64, 96))
    with torch.no_grad():
        logits = net.predict(x)[0].seg_logits.data
        left, right = (net.encode_decode(one, [dict(
            img_shape=torch.Size(SIZE))]) for one in (x[..., :64],
                                                      x[..., 32:]))
    want = torch.cat([left[..., :32], (left[..., 32:] + right[..., :32]) / 2,
                      right[..., 32:]], 3)
    torch.testing.assert_close(logits, want[0])


# One call of the backbone, or two


def test_equal_sizes_share_a_call():
    net = at_box(segmentor(), (0, 32, 0, 32)).train()
    net.extract_feat(images())
    assert net.backbone.calls == [(4, 3, 32, 32)]
    net = at_box(segmentor(detail_size=(16, 16)), (0, 16, 0, 16)).train()
    net.extract_feat(images())
    assert net.backbone.calls == [(2, 3, 32, 32), (2, 3, 16, 16)]


def test_a_backbone_with_batch_statistics_sees_each_alone():
    box = (8, 40, 24, 56)
    net = at_box(segmentor(backbone='TinyBackbone'), box).train()
    alone = copy.deepcopy(net.backbone)
    x = images()
    features = net.extract_feat(x)
    context = alone(up(x, (32, 32)))
    detail = alone(x[..., 8:40, 24:56])
    for mine, want in ((features.context, context),
                       (features.detail[0], detail)):
        for one, two in zip(mine, want, strict=True):
            assert torch.equal(one, two)
    for mine, want in zip(net.backbone.buffers(), alone.buffers(),
                          strict=True):
        assert torch.equal(mine, want)
    # In evaluation mode nothing keeps them apart.
    calls = []
    net.backbone.eval().register_forward_hook(
        lambda module, args, output: calls.append(len(args[0])))
    net.extract_feat(x)
    assert calls == [4]


def test_a_neck_is_part_of_it():
    net = at_box(segmentor(neck=dict(
        type='FPN', in_channels=[8, 8], out_channels=8, num_outs=2)),
        (0, 32, 32, 64)).train()
    before, after = net.multi_scale(images())
    assert before.boxes == after.boxes == ((0, 32, 32, 64), )
    for low, high, want in zip(after.context, after.detail[0],
                               net.neck(before.context), strict=True):
        torch.testing.assert_close(low, want)
        assert high.shape == low.shape
    net.decode_head(after).sum().backward()


# Boxes


def test_boxes_belong_to_a_pass():
    """Two passes at once don't disturb each other."""
    net = segmentor().train()
    one, two = images(seed=1), images(seed=2)
    boxes = (0, 32, 0, 32), (24, 56, 8, 40)
    alone = []
    for x, box in zip((one, two), boxes, strict=True):
        alone.append(net.decode_head.scales(at_box(net, box).extract_feat(x)))
    first = at_box(net, boxes[0]).extract_feat(one)
    second = at_box(net, boxes[1]).extract_feat(two)
    teacher = copy.deepcopy(net).eval()
    with torch.no_grad():
        teacher(images())
    for features, want in ((second, alone[1]), (first, alone[0])):
        got = net.decode_head.scales(features)
        assert torch.equal(got.fused, want.fused)
        assert got.box == want.box
    assert not torch.equal(alone[0].fused, alone[1].fused)


@pytest.mark.parametrize('include_last, offsets', [
    (True, {0, 8, 16, 24, 32}), (False, {0, 8, 16, 24})])
def test_places_are_drawn_on_the_grid(include_last, offsets):
    net = segmentor(include_last=include_last)
    gen = torch.Generator().manual_seed(0)
    seen = [net.draw_box(64, 64, gen) for _ in range(200)]
    assert {box[0] for box in seen} == {box[2] for box in seen} == offsets
    assert all((box[1] - box[0], box[3] - box[2]) == CROP for box in seen)
    assert len({(box[0], box[2]) for box in seen}) == len(offsets)**2
    torch.manual_seed(5)  # which a given generator is not
    gen.manual_seed(0)
    assert [net.draw_box(64, 64, gen) for _ in range(9)] == seen[:9]
    # Without a generator it is torch's own that counts.
    for _ in range(2):
        torch.manual_seed(3)
        seen.append(net.draw_box(64, 64))
    assert seen[-1] == seen[-2]


# Heads


@pytest.mark.parametrize('head, stride', [
    (FCN, 4), (SEGFORMER, 2), (UPER, 2), (dict(
        type='DAFormerHead', in_channels=[8, 8], in_index=[0, 1], channels=8,
        embed_dims=8, num_classes=CLASSES, fusion=dict(type='ConvFusion')), 2),
    (dict(type='DLV2Head', in_channels=8, in_index=1, num_classes=CLASSES,
          dilations=(1, 2)), 4)])
def test_stock_heads_inside(head, stride):
    net = segmentor(head=head).train()
    losses = net.loss(images(), samples())
    losses = {k: v for k, v in losses.items() if 'loss' in k}
    assert set(losses) == {'decode.loss_ce', 'decode.hr.loss_ce'}
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    with torch.no_grad():
        assert net.eval()(images()).shape == (
            2, CLASSES, 64 // stride, 64 // stride)


STOCK = {
    'mit-segformer': (
        dict(type='MixVisionTransformer', embed_dims=8,
             num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 2]),
        dict(SEGFORMER, in_channels=[8, 8, 8, 16], in_index=[0, 1, 2, 3]), 4),
    'resnet-psp': (
        dict(type='ResNetV1c', depth=18, base_channels=8, stem_channels=8,
             strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), norm_cfg=NORM),
        dict(type='PSPHead', in_channels=64, in_index=3, channels=8,
             pool_scales=(1, 2), num_classes=CLASSES, norm_cfg=NORM,
             dropout_ratio=0.), 8),
    'resnet-aspp-plus': (
        dict(type='ResNetV1c', depth=18, base_channels=8, stem_channels=8,
             norm_cfg=NORM),
        dict(type='DepthwiseSeparableASPPHead', in_channels=64, in_index=3,
             channels=8, dilations=(1, 2), c1_in_channels=8, c1_channels=4,
             num_classes=CLASSES, norm_cfg=NORM, dropout_ratio=0.), 4),
    'swin-uper': (
        dict(type='SwinTransformer', embed_dims=8, depths=[1, 1, 1, 1],
             num_heads=[1, 1, 1, 1], window_size=4),
        dict(UPER, in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3]), 4),
    'hrnet-fcn': (
        dict(type='HRNet', norm_cfg=NORM, norm_eval=False, extra=dict(
            stage1=dict(num_modules=1, num_branches=1, block='BASIC',
                        num_blocks=(1, ), num_channels=(8, )),
            stage2=dict(num_modules=1, num_branches=2, block='BASIC',
                        num_blocks=(1, 1), num_channels=(4, 8)),
            stage3=dict(num_modules=1, num_branches=3, block='BASIC',
                        num_blocks=(1, 1, 1), num_channels=(4, 8, 8)),
            stage4=dict(num_modules=1, num_branches=4, block='BASIC',
                        num_blocks=(1, 1, 1, 1),
                        num_channels=(4, 8, 8, 8)))),
        dict(FCN, in_channels=[4, 8, 8, 8], in_index=[0, 1, 2, 3],
             input_transform='resize_concat', channels=28), 4),
    'vit-fcn': (
        dict(type='VisionTransformer', img_size=(32, 32), patch_size=8,
             embed_dims=8, num_layers=1, num_heads=1, mlp_ratio=2),
        dict(FCN, in_index=0), 8)}


@pytest.mark.parametrize('name', STOCK)
def test_stock_networks(name):
    """Any backbone and head, in training and with windows."""
    backbone, head, stride = STOCK[name]
    net = MODELS.build(dict(
        config(head=head, divisor=2 * stride), backbone=backbone)).train()
    losses = {key: value for key, value in
              net.loss(images(), samples()).items() if 'loss' in key}
    assert set(losses) == {'decode.loss_ce', 'decode.hr.loss_ce'}
    sum(losses.values()).backward()
    # What the plain segmentor has no use for, as stages that no head asks
    # for, has no gradient here either.
    plain = config(backbone=None)
    plain.pop('detail_size')
    plain = MODELS.build(dict(
        plain, type='EncoderDecoder', backbone=backbone,
        decode_head=copy.deepcopy(head))).train()
    stock = plain.loss(images(), samples())
    sum(value for key, value in stock.items() if 'loss' in key).backward()
    assert unused(net) == unused(plain)
    x = images(1)
    net.eval()
    with torch.no_grad():
        outputs = net.decode_head.scales(net.extract_feat(x))
        # Window by window.
        alone = segmentor_windows(net, x, stride)
    assert outputs.fused.shape[-2:] == (64 // stride, 64 // stride)
    torch.testing.assert_close(outputs.detail, alone, rtol=1e-4, atol=1e-5)


def unused(net):
    """Parameters of the backbone without a gradient."""
    return [key for key, one in net.backbone.named_parameters()
            if one.requires_grad and one.grad is None]


def segmentor_windows(net, x, stride):
    """Mean of the head's logits over windows, one pass each."""
    side = 64 // stride
    total, count = torch.zeros(1, CLASSES, side, side), torch.zeros(side, side)
    for box in net.windows(64, 64):
        top, bottom, left, right = (edge // stride for edge in box)
        total[..., top:bottom, left:right] += net.decode_head.head(
            net.backbone(x[..., box[0]:box[1], box[2]:box[3]]))
        count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize('head', [
    dict(FCN, type='DAHead', pam_channels=4, num_convs=None,
         concat_input=None),
    dict(type='OCRHead', in_channels=[8, 8], in_index=[0, 1],
         input_transform='resize_concat', channels=8, ocr_channels=8,
         num_classes=CLASSES, norm_cfg=NORM)])
def test_heads_with_several_maps_are_refused(head):
    head = {key: value for key, value in head.items() if value is not None}
    with pytest.raises(ValueError, match=rf'HRDAHead.head.type = '
                                         rf'{head["type"]} gives more'):
        MODELS.build(dict(type='HRDAHead', head=head))


def test_the_attention_takes_after_the_head():
    head = MODELS.build(dict(type='HRDAHead', head=dict(
        SEGFORMER, dropout_ratio=0.3, norm_cfg=dict(type='SyncBN'))))
    attention = head.scale_attention
    assert attention.in_index == [0, 1]
    assert attention.channels == 256
    assert attention.dropout_ratio == 0.3
    assert isinstance(attention.fuse_layer.bn, nn.SyncBatchNorm)
    assert attention.fuse_layer.conv.kernel_size == (1, 1)
    assert [one.proj.out_features for one in
            attention.embed_layers.values()] == [256, 256]
    own = MODELS.build(dict(type='HRDAHead', head=FCN, attention=dict(
        type='FCNHead', channels=4, num_convs=1)))
    assert type(own.scale_attention).__name__ == 'FCNHead'
    assert own.scale_attention.in_index == 1


def test_published_names_of_weights():
    head = MODELS.build(dict(type='HRDAHead', head=SEGFORMER))
    assert {name.split('.')[0] for name in head.state_dict()} == {
        'head', 'scale_attention'}


# Supervised training


def samples(size=SIZE, number=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(number):
        labels = torch.randint(0, CLASSES, size, generator=gen)
        labels[:3] = 255
        result.append(sample(labels, size))
    return result


def test_losses_are_those_of_fused_logits_and_detail():
    box = (16, 48, 8, 40)
    net = at_box(segmentor(decode=dict(
        detail_weight=0.2, context_weight=0.3)), box).train()
    x, truth = images(), samples()
    outputs = net.decode_head.scales(net.extract_feat(x))
    labels = torch.cat([one.gt_sem_seg.data for one in truth])

    def entropy(logits, labels):
        # mmseg's mean is over all pixels, ignored ones too.
        each = F.cross_entropy(up(logits, labels.shape[-2:]), labels,
                               ignore_index=255, reduction='none')
        return each.mean()

    losses = net.loss(x, truth)
    for key, want in {
            'decode.loss_ce': 0.5 * entropy(outputs.fused, labels),
            'decode.hr.loss_ce': 0.2 * entropy(
                outputs.detail, labels[:, 16:48, 8:40]),
            'decode.lr.loss_ce': 0.3 * entropy(outputs.context, labels),
    }.items():
        torch.testing.assert_close(losses[key], want)
    assert set(net.decode_head.loss(net.extract_feat(x), truth)) == {
        f'{part}{name}' for part in ('', 'hr.', 'lr.')
        for name in ('loss_ce', 'acc_seg')}


def test_auxiliary_heads_see_the_context():
    net = segmentor(auxiliary_head=copy.deepcopy(FCN)).train()
    x, truth = images(), samples()
    losses = net.loss(x, truth)
    want = net.auxiliary_head.loss(net.backbone(up(x, (32, 32))), truth,
                                   None)
    torch.testing.assert_close(losses['aux.loss_ce'], want['loss_ce'])


# In adaptation


def uda(parts=None, **changes):
    model = build(config(**changes), **(parts or dacs_parts()))
    model.keep_step = True
    return model


def mic_parts():
    parts = dacs_parts()
    parts['views'].update(
        target_labelled=dict(type='PseudoLabelled'),
        masked=dict(type='BlockMask', view='target_labelled', block=16))
    parts['objectives']['masked'] = dict(type='Segmentation', view='masked')
    return parts


def test_one_step_of_mic_on_hrda():
    model = uda(mic_parts())
    losses = run(model, batch(SIZE))
    for view in ('source', 'mixed', 'masked'):
        for part in ('', 'hr.'):
            value = losses[f'{view}.decode.{part}loss_ce']
            assert value > 0 and torch.isfinite(value)
    total(losses).backward()
    assert all(one.grad is not None for one in model.segmentor.parameters())
    step = model.last_step
    assert step.predictions['ema', 'target'].shape == (2, CLASSES, *SIZE)
    assert model.teachers['ema'].model.backbone.calls[-1][0] == 2 * 9 + 2


def test_a_teachers_logits_show_the_image_without_its_padding():
    model = uda()
    data = model.data_preprocessor(batch((64, 60)), True)
    images = {name: one[..., :60] for name, one in data['inputs'].items()}
    step = model._step(images, data['data_samples'])
    logits = Predictor('ema', 'target').logits(step)
    assert step.view('target').images.shape[-2:] == logits.shape[-2:] == (
        64, 60)
    torch.testing.assert_close(
        logits.softmax(1), step.teacher('ema', 'target'))


def test_adapted_losses_are_the_stock_ones():
    model = uda(dacs_parts(objectives=dict(
        source=dict(type='Segmentation', view='source'))))
    net = at_box(model.segmentor, (8, 40, 0, 32))
    data = model.data_preprocessor(batch(SIZE), True)
    mine = model(**copy.deepcopy(data), mode='loss')
    stock = net.loss(data['inputs']['source'], data['data_samples']['source'])
    for key in ('decode.loss_ce', 'decode.hr.loss_ce'):
        torch.testing.assert_close(mine[f'source.{key}'], stock[key])


def test_the_weight_of_an_objective_is_that_of_both_losses():
    parts, half = mic_parts(), mic_parts()
    half['objectives']['masked']['weight'] = 0.5
    full, less = (run(uda(one), batch(SIZE)) for one in (parts, half))
    for key in ('masked.decode.loss_ce', 'masked.decode.hr.loss_ce'):
        torch.testing.assert_close(less[key], 0.5 * full[key])


def test_the_details_weights_are_those_inside_the_box():
    net = at_box(segmentor(), (8, 40, 32, 64)).train()
    adapter = MultiScaleHead(net.decode_head, 'decode_head')
    features = net.extract_feat(images())
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, *SIZE), generator=gen)
    masks = torch.rand(2, *SIZE, generator=gen) < 0.5
    parts = ((torch.tensor(1.), masks), (torch.tensor(0.25), ~masks))
    weights = torch.where(masks, 1., 0.25)
    outputs = adapter.outputs(features, None)
    losses = adapter.losses(features, outputs, None,
                            Target(labels, weights, parts, labels))
    crop = (slice(None), slice(8, 40), slice(32, 64))
    each = F.cross_entropy(up(outputs.detail, CROP), labels[crop],
                           reduction='none')
    torch.testing.assert_close(losses['hr.loss_ce'],
                               0.1 * (each * weights[crop]).mean())
    inside = Target(labels, weights, parts, labels).crop(outputs.box)
    assert torch.equal(inside.edges, labels[crop])
    assert torch.equal(sum(scale * mask for scale, mask in inside.parts),
                       weights[crop])


def test_losses_without_a_weight_map_work_on_the_detail_too():
    head = dict(FCN, loss_decode=dict(type='DiceLoss', loss_name='loss_dice'))
    model = uda(head=head)
    losses = run(model, batch(SIZE))
    assert losses['mixed.decode.hr.loss_dice'] > 0
    total(losses).backward()


def test_places_are_a_function_of_position():
    def boxes(model):
        run(model, batch(SIZE))
        return {name: one.features.boxes for name, one in
                model.last_step.students.items()}

    first = boxes(uda(mic_parts()))
    torch.manual_seed(123)
    again = uda(mic_parts())
    assert boxes(again) == first
    assert boxes(again) != first  # the next iteration
    assert len(set(first.values())) > 1


def test_contrast_and_feature_distance_see_the_context():
    parts = dacs_parts()
    parts['objectives'].update(
        contrast=dict(type='Contrast', bank_from='teacher'),
        distance=dict(type='FeatureDistance', classes=(1, 2), min_ratio=0.))
    model = uda(parts, auxiliary_head=dict(
        type='ContrastHead', in_channels=8, num_classes=CLASSES, channels=4,
        features='decoder', bank=dict(type='PrototypeBank')))
    frozen = copy.deepcopy(model.segmentor.backbone)
    frozen.calls.clear()
    model.objectives['distance'].freeze(frozen)
    losses = run(model, batch(SIZE))
    step = model.last_step
    student = step.students['source']
    assert frozen.calls == [(2, 3, 32, 32)]
    torch.testing.assert_close(
        student.backbone_images, up(step.view('source').images, (32, 32)))
    # At a quarter of the context's resolution.
    assert student.decoder_features.shape == (2, 8, 8, 8)
    assert student.embed('aux').shape == (2, 4, 8, 8)
    assert step.passes['ema', 'source'].embed('aux').shape == (2, 4, 8, 8)
    context = student._outputs['decode'][0].context
    with torch.no_grad():
        again = model.segmentor.decode_head.head.conv_seg(
            student.decoder_features)
    torch.testing.assert_close(again, context)
    assert losses['contrast.loss_source'] > 0
    total(losses).backward()


@pytest.mark.parametrize('training', [True, False])
def test_nothing_asks_for_a_value(training):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    net = segmentor(max_windows=5).train(training).to('meta')
    outputs = net.decode_head.scales(net.extract_feat(images().to('meta')))
    assert outputs.fused.shape == (2, CLASSES, 16, 16)
    if training:
        labels = torch.zeros(2, *SIZE, dtype=torch.long, device='meta')
        adapter = MultiScaleHead(segmentor().decode_head, 'decode_head')
        losses = adapter.losses(None, outputs, None, Target(labels))
        sum(losses.values()).backward()


# Mistakes


@pytest.mark.parametrize('changes, message', [
    (dict(detail_size=(30, 32)), r'HRDASegmentor.detail_size .* multiples of '
                                 'divisor = 8'),
    (dict(detail_size=32), 'must be a height and a width, .* got 32'),
    (dict(attention=None), 'attention must be a dict, .* got None'),
    (dict(divisor=0), 'HRDASegmentor.divisor must be at least 1'),
    (dict(max_windows=0), 'max_windows must be at least 1'),
    (dict(decode_head=FCN), 'type = FCNHead is no HRDAHead'),
    (dict(decode=dict(detail_weight=0.8, context_weight=0.3)),
     'at most 1 together'),
    (dict(attention=1.5), r'as a number, must lie in \[0, 1\]')])
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        segmentor(**changes)


def test_another_segmentor_is_named():
    plain = config()
    plain.pop('detail_size')
    net = MODELS.build(dict(plain, type='EncoderDecoder'))
    with pytest.raises(ValueError, match="to 'HRDASegmentor'"):
        net(images())


def test_a_grid_too_fine_for_the_logits_is_named():
    net = segmentor(divisor=4).train()
    with pytest.raises(ValueError, match='divisor = 4, but each logit of the '
                                         r'context covers 8 .* divisor=8'):
        net.decode_head(net.extract_feat(images()))
    net = at_box(segmentor(detail_size=(36, 36), divisor=1, factor=1),
                 (0, 34, 0, 34)).train()
    with pytest.raises(ValueError, match='no whole number of pixels'):
        net.decode_head(net.extract_feat(images()))


@pytest.mark.parametrize('size, message', [
    ((64, 60), r'multiples of divisor = 8, got 64 x 60'),
    ((24, 64), r'crop of 32 x 32 pixels does not fit into an image of 24')])
def test_training_crops_that_do_not_fit_are_named(size, message):
    with pytest.raises(ValueError, match=message):
        segmentor().train().extract_feat(images(size=size))


def test_inputs_that_cannot_be_cropped_are_named():
    model = uda()
    data = model.data_preprocessor(batch(SIZE), True)
    step = model._step(data['inputs'], data['data_samples'])
    view = step.view('source').replace(inputs=dict(extra=1))
    with pytest.raises(ValueError, match=r"'source' has inputs .*'extra'"):
        model.adapter.features(view, torch.Generator())


def test_features_are_the_contexts_stages():
    features = segmentor().train().extract_feat(images())
    assert isinstance(features, MultiScale)
    assert len(features) == 2 and features[-1] is features.context[1]
    assert [one is two for one, two in zip(features, features.context,
                                           strict=True)] == [True, True]
    assert issubclass(HRDASegmentor, MODELS.get('EncoderDecoder'))
    assert not hasattr(HRDAHead, 'hr_crop_box')


def test_sliding_windows_go_in_batches():
    net = segmentor().eval()
    images = torch.rand(2, 3, 96, 128)
    metas = [dict(ori_shape=(96, 128), img_shape=(96, 128),
                  pad_shape=(96, 128), padding_size=(0, 0, 0, 0))] * 2
    slide = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    found = {}
    with torch.no_grad():
        for batched in (None, 12):
            net.test_cfg = ConfigDict(slide, batched=batched)
            net.backbone.calls.clear()
            found[batched] = (net.inference(images, copy.deepcopy(metas)),
                              len(net.backbone.calls))
    assert torch.allclose(found[12][0], found[None][0], atol=1e-5)
    assert found[12][1] < found[None][1]
