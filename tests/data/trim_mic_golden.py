"""Trim the recorded golden run of MIC on HRDA to what the tests need.

    python tests/data/trim_mic_golden.py FULL/mic_hrda.npz \
        tests/data/mic_hrda.npz

The full archive holds three iterations of the published training step on a
tiny network, in two modes (``sep``: one source and one target image are
masked) and two precisions. Of the initial student only what differs from the
recording of DAFormer is kept, under its published name; that the rest is the
same is checked here. The frozen ImageNet backbone is kept as its last-stage
features of the down-scaled source images, in float64. Arrays are stacked over
the iterations.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from trim_dacs_golden import frozen_backbone

HERE = Path(__file__).resolve().parent
ITERATIONS = range(3)
GLOBALS = ('mean', 'std', 'param_names', 'param_weight_decay',
           'param_base_lr')
INPUTS = ('src_img', 'tgt_img', 'src_label', 'valid_pseudo_mask')
JITTER = tuple(f'jitter_{name}' for name in (
    'brightness', 'contrast', 'saturation', 'hue', 'order'))
DRAWS = ('draw/color_jitter_u', 'draw/blur_u', 'draw/chosen_classes',
         *(f'draw/{name}' for name in JITTER), 'draw/blur_sigma',
         'draw/mic_mask_u', 'hr_box')
MIC_DRAWS = ('draw/mic_color_jitter_u', 'draw/mic_blur_u',
             *(f'draw/mic_{name}' for name in JITTER),
             'draw/mic_blur_sigma')
LOSSES = ('decode.loss_seg', 'decode.hr.loss_seg',
          'src.loss_imnet_feat_dist', 'mix.decode.loss_seg',
          'mix.decode.hr.loss_seg', 'masked.decode.loss_seg',
          'masked.decode.hr.loss_seg')
BN = tuple(f'bn_{who}/{norm}.{name}' for who in ('student', 'teacher')
           for norm in ('head', 'att') for name in (
               'running_mean', 'running_var', 'num_batches_tracked'))
#: Logits at every second or fourth position.
COARSE = tuple(f'{view}_{name}' for view in ('src', 'masked')
               for name in ('raw_lr', 'hr', 'att'))
TEACHER = ('teacher_raw_lr', 'teacher_att')
FINE = ('src_fused', 'mix_fused', 'masked_fused', 'teacher_hr',
        'teacher_fused')
TENSORS = ('backbone.block1.0.attn.kv.weight',
           'backbone.block1.0.attn.norm.bias',
           'backbone.block2.0.mlp.dwconv.dwconv.weight',
           'backbone.block3.0.norm1.weight', 'backbone.block4.0.attn.q.bias',
           'backbone.norm4.weight',
           'decode_head.head.fuse_layer.aspp_modules.1.pointwise_conv.bn'
           '.weight', 'decode_head.head.fuse_layer.bottleneck.bn.bias',
           'decode_head.head.conv_seg.weight',
           'decode_head.head.conv_seg.bias',
           'decode_head.scale_attention.fuse_layer.conv.weight',
           'decode_head.scale_attention.fuse_layer.bn.weight',
           'decode_head.scale_attention.conv_seg.weight',
           'decode_head.scale_attention.conv_seg.bias')
#: Of which the gradients of all runs were kept.
HEAD = tuple(name for name in TENSORS if name.startswith('decode_head.'))


def main(source: str, target: str) -> None:
    full = np.load(source)
    kept = {name: full[name] for name in GLOBALS}

    def stacked(name: str, run: str = '') -> np.ndarray:
        return np.stack([full[f'{run}it{i}/{name}'] for i in ITERATIONS])

    kept['pseudo_threshold'] = full['pseudo_threshold']
    assert full['sep/pseudo_threshold'] == full['pseudo_threshold']
    student(full, kept)
    for name in (*INPUTS, *DRAWS, *MIC_DRAWS, 'fd_label', 'fd_mask',
                 'mixed_label', 'pseudo_label', 'teacher_raw_hr_crops_norm',
                 'lr'):
        kept[name] = stacked(name)
    assert np.array_equal(stacked('masked_label'), kept['pseudo_label'])
    for name in (*DRAWS, 'mixed_label', 'pseudo_label', 'masked_label'):
        kept[f'sep/{name}'] = stacked(name, 'sep/')
    for run in ('', 'sep/'):
        weight = stacked('masked_weight', run)
        # q or 1, and 0 in the margins: a few numbers, not a map of them.
        kept[f'{run}masked_weight_max'] = weight.max((2, 3))
        assert np.array_equal(
            weight, np.where(weight > 0, weight.max((2, 3), keepdims=True),
                             0))
        kept[f'{run}masked_weight_on'] = weight > 0
        for name in ('mixed_img', 'masked_img'):
            if run and name == 'mixed_img':
                continue
            kept[f'{run}{name}_s8'] = np.stack([
                full[f'{run}it{i}/{name}'][..., ::8, ::8]
                if f'{run}it{i}/{name}' in full.files else
                full[f'{run}it{i}/{name}_s2'][..., ::4, ::4]
                for i in ITERATIONS])
    for name in (*COARSE, *TEACHER):
        kept[f'{name}_s2'] = stacked(name)[..., ::2, ::2]
    for name in FINE:
        kept[f'{name}_s4'] = stacked(name)[..., ::4, ::4]
    for name in ('masked_fused', 'teacher_fused'):
        kept[f'f64/{name}_s4'] = full[f'f64/it0/{name}'][..., ::4, ::4]
    kept['sep/masked_fused_s4'] = stacked(
        'masked_fused', 'sep/')[..., ::4, ::4]
    kept['imnet_features'] = imnet_features(full, stacked('src_img'))

    for run in ('', 'f64/', 'sep/', 'sep_f64/'):
        kept[f'{run}q'] = stacked('q', run)
        kept[f'{run}param_norm'] = stacked('param_norm', run)
        kept[f'{run}grad_norm'] = stacked(
            'grad_norm_after_backward', run)[:, -1]
        for name in LOSSES:
            kept[f'{run}log/{name}'] = stacked(f'log/{name}', run)
    for run in ('', 'f64/'):
        kept[f'{run}teacher_norm'] = stacked('teacher_norm', run)
        for name in BN:
            kept[run + name] = stacked(name, run)
    kept['tensors'], kept['head_tensors'] = np.array(TENSORS), np.array(HEAD)
    for run, names in (('f64/', TENSORS), ('sep_f64/', HEAD)):
        kept[f'{run}grad'] = np.concatenate(
            [full[f'{run}it2/grad/{name}'].ravel() for name in names])
    for run in ('', 'f64/'):
        kept[f'{run}param'] = np.concatenate(
            [full[f'{run}it2/param/{name}'].ravel() for name in TENSORS])
    np.savez_compressed(target, **kept)
    print(f'{len(kept)} arrays, {Path(target).stat().st_size} bytes')


def student(full: np.lib.npyio.NpzFile, kept: dict[str, np.ndarray]) -> None:
    """Keep what is no part of the other recording's initial student."""
    known, start = {}, 0
    with np.load(HERE / 'dacs_4iter.npz') as other:
        for name, shape in zip(other['student_names'],
                               other['student_shapes'], strict=True):
            size = int(np.prod([int(one) for one in str(shape).split('x')
                                if one], dtype=int))
            known[str(name)] = other['student_values'][start:start + size]
            start += size
    same = 0
    for name in full.files:
        if not name.startswith('student/'):
            continue
        theirs = name[8:].replace('decode_head.head.', 'decode_head.')
        if theirs in known and np.array_equal(
                known[theirs], full[name].ravel()):
            same += 1
        else:
            kept[name] = full[name]
    assert same == len(known) - 1, same  # all but the classifier's weight


def imnet_features(full: np.lib.npyio.NpzFile, raw: np.ndarray
                   ) -> np.ndarray:
    """Last stage of the frozen backbone at half the resolution."""
    mean, std = (full[key].reshape(3, 1, 1) for key in ('mean', 'std'))
    images = torch.from_numpy((raw.astype(np.float32) - mean) / std).double()
    encoder = frozen_backbone(full)
    with torch.no_grad():
        return torch.stack([encoder(F.avg_pool2d(one, 2))[-1]
                            for one in images]).numpy()


if __name__ == '__main__':
    main(*sys.argv[1:])
