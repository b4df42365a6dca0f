"""Trim the recorded numbers of published ProDA code to what tests need.

    python tests/data/trim_proda_golden.py FULL/contrast.npz \
        tests/data/proda.npz

Features are those of tests/data/contrast.npz. Logits are whole numbers of
1/256. Of weights, of rectified labels and of gradients every eighth pixel is
kept (of the gradients also norm and sums over the image).
"""

import sys
from pathlib import Path

import numpy as np

ITERATIONS = range(5)
RUNS = ('m0.0001', 'm0.1')


def main(source: str, target: str) -> None:
    full = np.load(source)
    kept = {'proto_init': full['proda/proto_init']}

    def stacked(name: str, new: str) -> None:
        kept[new] = np.stack([full[name.format(i)] for i in ITERATIONS])

    for name in ('logit_src', 'logit_tgt'):
        stacked('common/it{}/' + name, name)
        whole = kept[name] * np.float16(256)
        kept[name] = whole.astype(np.int16)
        assert np.array_equal(kept[name], whole)
    for name in ('weights', 'rectified', 'pseudo_label'):
        stacked('proda/m0.0001/it{}/' + name, name)
    for name in ('weights', 'rectified'):
        kept[name] = kept[name][..., ::4, ::4]
    kept['soft_pseudo_label'] = full['proda/m0.0001/it0/soft_pseudo_label']
    for run in RUNS:
        for name in ('loss_cts', 'loss_consist', 'loss', 'rce', 'regular',
                     'proto', 'proto_num'):
            stacked(f'proda/{run}/it{{}}/{name}', f'{run}/{name}')
        for i in (0, 3):
            for name in ('grad_out', 'grad_feat_strong'):
                key = f'{run}/it{i}/{name}'
                kept[f'{key}_s8'] = full[f'proda/{key}_s2'][..., ::4, ::4]
                for part in ('norm', 'chsum'):
                    kept[f'{key}_{part}'] = full[f'proda/{key}_{part}']
    for i in ITERATIONS:
        for name in ('update_ids', 'update_vectors'):
            key = f'm0.1/it{i}/{name}'
            kept[key] = full[f'proda/{key}']
    for name in ('proto', 'proto_num'):
        kept[f'offline_mean/{name}'] = full[f'proda/offline_mean/{name}']
    np.savez_compressed(target, **kept)
    print(f'{len(kept)} arrays, {Path(target).stat().st_size} bytes')


if __name__ == '__main__':
    main(*sys.argv[1:])
