"""Trim the recorded golden run of DAFormer to what the tests need.

    python tests/data/trim_dacs_golden.py FULL/dacs_4iter.npz \
        tests/data/dacs_4iter.npz

The full archive holds four iterations of the published training step on a
tiny network. Kept are the inputs, all draws, losses, norms of all gradients
and weights, and a few tensors in full. Two things are stored in another form:

- images as the uint8 they were normalised from (exact);
- the frozen ImageNet backbone as its last-stage features of the four source
  batches in float64, computed with its recorded weights by mmseg's MiT with
  the published eps (within 1e-14 of the published code in float64).
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmseg_contrast.models import ReferenceMixVisionTransformer  # noqa: E402
from mmseg_contrast.models.legacy import convert_backbone  # noqa: E402

GLOBALS = ('mean', 'std', 'param_names', 'param_weight_decay',
           'param_base_lr')
#: Of the float32 run at the start of the schedule.
START = ('src_label', 'draw/color_jitter_u', 'draw/blur_u',
         'draw/chosen_classes', 'draw/jitter_brightness',
         'draw/jitter_contrast', 'draw/jitter_saturation', 'draw/jitter_hue',
         'draw/jitter_order', 'draw/blur_sigma', 'pseudo_label',
         'mixed_label', 'fd_label', 'fd_mask')
SAMPLED = ('teacher_logits', 'mixed_img', 'pseudo_weight')
RUNS = ('', 'late/', 'f64/', 'f64_late/')
BN = ('running_mean', 'running_var', 'num_batches_tracked')
EVERY_RUN = (
    'q', 'log/decode.loss_seg', 'log/src.loss_imnet_feat_dist',
    'log/mix.decode.loss_seg', 'param_norm', 'teacher_norm', *(
        f'bn_{who}/{name}' for who in ('student', 'teacher') for name in BN))
TENSORS = ('backbone.patch_embed1.norm.weight',
           'backbone.block1.0.attn.norm.bias',
           'backbone.block2.0.mlp.dwconv.dwconv.weight',
           'backbone.block3.0.attn.proj.bias',
           'backbone.block4.0.attn.q.bias', 'backbone.norm4.weight',
           'decode_head.embed_layers.3.proj.weight',
           'decode_head.fuse_layer.aspp_modules.1.pointwise_conv.bn.weight',
           'decode_head.fuse_layer.bottleneck.bn.bias',
           'decode_head.conv_seg.weight', 'decode_head.conv_seg.bias')


def main(source: str, target: str) -> None:
    full = np.load(source)
    kept = {name: full[name] for name in GLOBALS}

    # Many small arrays would cost more in headers than in numbers.
    student = [name for name in full.files if name.startswith('student/')]
    kept['student_names'] = np.array([name[8:] for name in student])
    kept['student_shapes'] = np.array(
        ['x'.join(map(str, full[name].shape)) for name in student])
    kept['student_values'] = np.concatenate(
        [full[name].ravel().astype(np.float32) for name in student])

    def stacked(run: str, name: str) -> np.ndarray:
        return np.stack([full[f'{run}it{i}/{name}'] for i in range(4)])

    for name in START:
        kept[name] = stacked('', name)
    for name in SAMPLED:
        kept[f'{name}_s4'] = stacked('', name)[..., ::4, ::4]
    mean, std = (full[key].reshape(3, 1, 1) for key in ('mean', 'std'))
    for name in ('src_img', 'tgt_img'):
        images = stacked('', name)
        raw = np.rint(images * std + mean).astype(np.uint8)
        assert np.array_equal((raw.astype(np.float32) - mean) / std, images)
        kept[name] = raw
    encoder = frozen_backbone(full)
    images = torch.from_numpy(stacked('', 'src_img')).double()
    with torch.no_grad():
        kept['imnet_features'] = torch.stack(
            [encoder(one)[-1] for one in images]).numpy()

    for run in RUNS:
        for name in EVERY_RUN:
            kept[run + name] = stacked(run, name)
    for run in ('', 'late/'):
        kept[f'{run}lr'] = stacked(run, 'lr')
    for run in ('', 'f64_late/'):
        name = 'grad_norm_after_backward'
        kept[run + name] = stacked(run, name)
    for run in ('late/', 'f64_late/'):
        for kind in ('param', 'grad'):
            kept[f'{run}{kind}'] = np.concatenate(
                [full[f'{run}it3/{kind}/{name}'].ravel()
                 for name in TENSORS])
    kept['tensors'] = np.array(TENSORS)
    np.savez_compressed(target, **kept)
    print(f'{len(kept)} arrays, {Path(target).stat().st_size} bytes')


def frozen_backbone(full: np.lib.npyio.NpzFile) -> torch.nn.Module:
    encoder = ReferenceMixVisionTransformer(
        embed_dims=8, num_layers=(1, 1, 1, 1), drop_path_rate=0.0)
    prefix = 'imnet/backbone.'
    state = {name[len(prefix):]: torch.from_numpy(full[name])
             for name in full.files if name.startswith(prefix)}
    encoder.load_state_dict(convert_backbone(state).weights)
    return encoder.double().eval()


if __name__ == '__main__':
    main(*sys.argv[1:])
