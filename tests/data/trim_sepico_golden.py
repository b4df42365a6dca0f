"""Trim the recorded golden run of SePiCo to what the tests need.

    python tests/data/trim_sepico_golden.py FULL/sepico_step.npz \
        tests/data/sepico_step.npz

The full archive holds three iterations of the published training step
(DistCL) on the tiny network of the recording of DAFormer, in three runs. Of
the initial student only the projection is kept: the rest is the same, which
is checked here, and in ``dacs_4iter.npz``. Arrays are stacked over the
iterations.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ITERATIONS = range(3)
GLOBALS = ('param_names', 'param_weight_decay', 'param_base_lr', 'mean_rgb',
           'std_rgb')
RUNS = ('f32', 'f64', 'f64_tau0.1')
LOSSES = ('src.decode.loss_seg', 'mix.decode.loss_seg', 'src.aux.loss_cl',
          'tgt.aux.loss_cl')
NORMS = ('fuse_layer.bottleneck.bn', 'convs.0.bn', 'convs.1.bn')
TENSORS = ('backbone.patch_embed1.norm.weight',
           'backbone.block1.0.attn.q.weight',
           'backbone.block2.0.mlp.dwconv.dwconv.weight',
           'backbone.block3.0.attn.proj.bias', 'backbone.norm4.weight',
           'decode_head.embed_layers.3.proj.weight',
           'decode_head.fuse_layer.bottleneck.bn.bias',
           'decode_head.conv_seg.weight', 'decode_head.conv_seg.bias',
           'auxiliary_head.convs.0.conv.weight',
           'auxiliary_head.convs.0.bn.weight',
           'auxiliary_head.convs.1.conv.weight',
           'auxiliary_head.convs.1.bn.weight',
           'auxiliary_head.convs.1.bn.bias')


def main(source: str, target: str) -> None:
    full = np.load(source)
    kept = {name: full[name] for name in GLOBALS}

    def stacked(name: str, run: str = '') -> np.ndarray:
        return np.stack([full[f'{run}it{i}/{name}'] for i in ITERATIONS])

    student(full, kept)
    for name in ('src_img_u8', 'src_label', 'tgt_img_u8'):
        kept[name] = stacked(name)
    draws(full, kept)

    # The runs differ in losses and statistics, but in no label but few.
    for run in RUNS:
        for name in ('q', 'mean', 'var', 'count', 'crop_offset_chosen'):
            kept[f'{run}/{name}'] = stacked(name, f'{run}/')
        for name in LOSSES:
            first = 1 if name.endswith('loss_cl') else 0
            kept[f'{run}/log/{name}'] = np.array([
                full[f'{run}/it{i}/log/{name}'] if i >= first else np.nan
                for i in ITERATIONS])
        kept[f'{run}/param'] = np.concatenate(
            [full[f'{run}/it2/param/{name}'].ravel() for name in TENSORS])
    kept['tensors'] = np.array(TENSORS)
    run = 'f64/'
    for name in ('pseudo_label_before_crop', 'pseudo_label', 'lr',
                 'has_grad', 'teacher_norm', 'forward/mix_label'):
        kept[run + name] = stacked(name, run)
    kept[f'{run}teacher_logits_crop_s4'] = stacked(
        'teacher_logits_crop_s4', run).astype(np.float32)
    kept[f'{run}teacher_feat_s4'] = stacked(
        'teacher_feat_s2', run)[..., ::2, ::2]
    kept[f'{run}forward/mix_weight_s4'] = stacked(
        'forward/mix_weight', run)[..., ::4, ::4]
    for who, first in (('src', 0), ('tgt', 1), ('mix', 0)):
        name = f'{run}it{{}}/forward/{who}_img_{{}}'
        kept[f'{run}forward/{who}_img_s8'] = np.stack(
            [full[name.format(i, 's2')][..., ::4, ::4]
             for i in ITERATIONS[first:]])
        kept[f'{run}forward/{who}_img_sum'] = np.array(
            [full[name.format(i, 'sum')] for i in ITERATIONS[first:]])
    kept[f'{run}forward/tgt_label'] = np.stack(
        [full[f'{run}it{i}/forward/tgt_label'] for i in ITERATIONS[1:]])
    for i in ITERATIONS:
        assert np.array_equal(full[f'{run}it{i}/forward/src_label'],
                              full[f'it{i}/src_label'])
    for run in RUNS[1:]:
        kept[f'{run}/param_norm'] = stacked('param_norm', f'{run}/')
        kept[f'{run}/grad_norm'] = np.stack(
            [full[f'{run}/it{i}/grad_norm_after_backward'][-1]
             for i in ITERATIONS])
    for i in ITERATIONS:
        names = [name for name in TENSORS
                 if f'f64/it{i}/grad/{name}' in full.files]
        assert i == 0 or len(names) == len(TENSORS)
    for run in RUNS[1:]:
        if f'{run}/it2/grad/{TENSORS[0]}' in full.files:
            kept[f'{run}/grad'] = np.concatenate(
                [full[f'{run}/it2/grad/{name}'].ravel()
                 for name in TENSORS])
    for who in ('student', 'teacher'):
        for norm in NORMS:
            head = 'decode_head' if norm[0] == 'f' else 'auxiliary_head'
            for name in ('running_mean', 'running_var', 'count'):
                kept[f'f64/bn_{who}/{norm}/{name}'] = stacked(
                    f'bn_{who}/{head}.{norm}/{name}', 'f64/')
    np.savez_compressed(target, **kept)
    print(f'{len(kept)} arrays, {Path(target).stat().st_size} bytes')


def student(full: np.lib.npyio.NpzFile, kept: dict[str, np.ndarray]) -> None:
    """Keep the projection; the rest is that of the other recording."""
    with np.load(HERE / 'dacs_4iter.npz') as other:
        start = 0
        values = other['student_values']
        for name in other['student_names']:
            wanted = full[f'student/{name}'].astype(np.float32).ravel()
            assert np.array_equal(values[start:start + wanted.size], wanted)
            start += wanted.size
        assert start == len(values)
        rest = set(other['student_names'])
    for name in full.files:
        if name.startswith('student/') and name[8:] not in rest:
            kept[name] = full[name]


def draws(full: np.lib.npyio.NpzFile, kept: dict[str, np.ndarray]) -> None:
    """The draws of each iteration by what they are for."""
    def drawn(i: int, number: int, kind: str) -> np.ndarray:
        return full[f'it{i}/draw/{number:02d}_{kind}']

    rows: dict[str, list] = {}
    for i in ITERATIONS:
        kinds = [str(kind) for kind in full[f'it{i}/draw/kinds']]
        assert kinds[:2] == ['U', 'U'], kinds
        one = dict(
            switch_jitter=drawn(i, 0, 'U'), switch_blur=drawn(i, 1, 'U'),
            crop_offsets=np.array([
                drawn(i, 2 + n, 'crop_offset') for n in range(40)
            ]).reshape(2, 10, 2),
            chosen_classes=np.stack([full[f'it{i}/draw/classes'][
                drawn(i, n, 'choice')] for n in (46, 47)]))
        # Source and target as batches, the mixed samples one by one.
        for view, numbers in (('source', (42, )), ('target', (44, )),
                              ('mixed', (48, 50))):
            factors = [np.stack([drawn(i, n, f'jit_{part}') for part in (
                'brightness', 'contrast', 'saturation', 'hue')], 1)
                for n in numbers]
            one[f'{view}_factors'] = np.concatenate(factors)
            orders, sigmas = ([drawn(i, n + extra, kind) for n in numbers]
                              for kind, extra in (('jit_order', 0),
                                                  ('sigma', 1)))
            repeat = 2 // len(numbers)
            one[f'{view}_order'] = np.repeat(np.stack(orders), repeat, 0)
            one[f'{view}_sigma'] = np.repeat(np.stack(sigmas), repeat)
        for name, value in one.items():
            rows.setdefault(name, []).append(value)
    kept.update({f'draw/{name}': np.stack(values)
                 for name, values in rows.items()})


if __name__ == '__main__':
    main(*sys.argv[1:])
