"""Trim the recorded numbers of published contrast code to what tests need.

    python tests/data/trim_contrast_golden.py FULL/contrast.npz \
        tests/data/contrast.npz

The full archive holds inputs, states, losses and gradients of nine methods,
computed with their published code. Kept are SPCL, SDCA, SePiCo,
ContrastiveSeg and CLUDA. Of gradients of maps the norm, the sums over the
image, and every eighth pixel are kept. Labels are at the resolution of the
features, which are whole numbers of 1/256.
"""

import sys
from pathlib import Path

import numpy as np

ITERATIONS = range(5)
SEPICO = [f'{kind}{extra}_tau{tau}_{domain}'
          for kind in ('proto', 'dist', 'bank') for extra in ('', '_reg')
          for tau in ('100', '0.1') for domain in ('src', 'tgt')]


def main(source: str, target: str) -> None:
    full = np.load(source)
    kept = {}

    def gradient(name: str, new: str | None = None) -> None:
        new = new or name
        kept[f'{new}_s8'] = full[f'{name}_s2'][..., ::4, ::4]
        for part in ('norm', 'chsum'):
            kept[f'{new}_{part}'] = full[f'{name}_{part}']

    def stacked(name: str, new: str | None = None,
                iterations: range = ITERATIONS) -> None:
        kept[new or name.format('')] = np.stack(
            [full[name.format(f'it{i}/')] for i in iterations])

    for name in ('feat_src', 'feat_tgt', 'feat_teacher'):
        stacked('common/{}' + name, name)
        whole = kept[name] * np.float16(256)
        kept[name] = whole.astype(np.int16)
        assert np.array_equal(kept[name], whole)
    for name in ('label_src', 'label_tgt'):
        stacked('common/{}' + name, name)
        kept[name] = kept[name][..., ::4, ::4]

    kept['spcl/proto_init'] = full['spcl/main/proto_init']
    for name in ('src_mask', 'tgt_mask', 'proto', 'loss',
                 'proto_absent_kept', 'loss_absent_kept'):
        stacked('spcl/main/{}' + name, f'spcl/{name}')
    for i in ITERATIONS:
        for domain in ('src', 'tgt'):
            gradient(f'spcl/main/it{i}/grad_{domain}',
                     f'spcl/it{i}/grad_{domain}')

    for name in ('tgt_mask', 'feat_mean', 'feat_var', 'feat_count'):
        stacked('sdca/tau100/{}' + name, f'sdca/{name}')
    for tau in ('100', '0.5'):
        for name in ('loss_feat', 'loss_feat_src'):
            stacked(f'sdca/tau{tau}/{{}}{name}', f'sdca/tau{tau}/{name}')
        for i in (0, 2, 4):
            for domain in ('src', 'tgt'):
                gradient(f'sdca/tau{tau}/it{i}/grad_feat_{domain}')

    for name in ('label_src_ratio', 'label_tgt_ratio', 'mean', 'var',
                 'count', 'bank_len', 'bank'):
        stacked('sepico/main/{}' + name, f'sepico/{name}')
    kept['sepico/cases'] = np.array(SEPICO)
    for name in ('loss', 'grad_norm'):
        kept[f'sepico/{name}'] = np.stack(
            [[full[f'sepico/main/it{i}/{case}/{name}'] for i in ITERATIONS]
             for case in SEPICO])
    for case in SEPICO:
        for i in ITERATIONS:
            name = f'sepico/main/it{i}/{case}/grad'
            if f'{name}_s2' in full:
                gradient(name, f'sepico/it{i}/{case}/grad')

    for i in (0, 3):
        for name in ('anchor_image', 'anchor_class', 'anchor_pixel',
                     'loss_f64', 'grad_anchor_f64', 'loss_f32',
                     'grad_feat_f32_path_norm'):
            key = f'cseg/no_memory_it{i}/{name}'
            kept[key] = full[key]
    for i in range(3):
        for name in ('draw_lengths', 'draws', 'segment_ptr',
                     'pixel_ptr_corrected'):
            key = f'cseg/memory/it{i}/{name}'
            kept[key] = full[key]
    for name in ('segment_queue', 'pixel_queue_corrected'):
        kept[f'cseg/{name}'] = full[f'cseg/memory/it2/{name}']

    for i in (0, 3):
        run = f'cluda/single_it{i}'
        kept[f'{run}/pseudo_weight'] = full[f'{run}/pseudo_weight']
        kept[f'{run}/plain/loss_without_255'] = full[
            f'{run}/plain/loss_without_255']
        for case in ('plain', 'weighted'):
            kept[f'{run}/{case}/loss'] = full[f'{run}/{case}/loss']
            gradient(f'{run}/{case}/grad')
        key = f'cluda/batch2_it{i}/loss_aligned'
        kept[key] = full[key]
    run = 'cluda/multi_resolution_it3'
    for name in ('att', 'hr_label', 'pseudo_weight'):
        kept[f'{run}/{name}'] = full[f'{run}/{name}']
    for case in ('source', 'mix'):
        for name in ('loss', 'grad_att'):
            kept[f'{run}/{case}/{name}'] = full[f'{run}/{case}/{name}']
        for name in ('grad_lr', 'grad_hr'):
            gradient(f'{run}/{case}/{name}')

    # Many small arrays would cost more in headers than in numbers.
    shapes = {name: np.asarray(one) for name, one in kept.items()}
    small = {name: one for name, one in shapes.items()
             if one.dtype == np.float64}
    rest = {name: one for name, one in shapes.items() if name not in small}
    np.savez_compressed(
        target, names=np.array(list(small)),
        shapes=np.array(['x'.join(map(str, one.shape))
                         for one in small.values()]),
        values=np.concatenate([one.ravel() for one in small.values()]),
        **rest)
    print(f'{len(kept)} arrays, {Path(target).stat().st_size} bytes')


if __name__ == '__main__':
    main(*sys.argv[1:])
