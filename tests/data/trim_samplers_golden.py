"""Trim the recorded numbers of published samplers to what tests need.

    python tests/data/trim_samplers_golden.py FULL/contrast.npz \
        tests/data/contrast_samplers.npz

The full archive is that of trim_contrast_golden.py, whose copy has the
features and labels. Kept here are labels in full resolution, logits,
ContrastiveSeg's anchors, and ReCo and U2PL with their draws. Of gradients of
maps the norm, the sums over the image, and every eighth pixel are kept.
Logits are whole numbers of 1/256.
"""

import sys
from pathlib import Path

import numpy as np


def main(source: str, target: str) -> None:
    full = np.load(source)
    kept = {}

    def keep(name: str) -> None:
        kept[name] = full[name]

    def gradient(name: str) -> None:
        kept[f'{name}_s8'] = full[f'{name}_s2'][..., ::4, ::4]
        for part in ('norm', 'chsum'):
            keep(f'{name}_{part}')

    kept['label_src'] = np.stack(
        [full[f'common/it{i}/label_src'] for i in range(5)])
    logits = np.stack([full[f'common/it{i}/logit_src'] for i in range(4)])
    kept['logit_src'] = (logits * np.float16(256)).astype(np.int16)
    assert np.array_equal(kept['logit_src'], logits * np.float16(256))

    for i in (0, 3):
        for name in ('anchor_image', 'anchor_class', 'anchor_pixel',
                     'anchor_num_hard', 'draw_lengths', 'draws'):
            keep(f'cseg/no_memory_it{i}/{name}')
    for i in (0, 2):
        for name in ('mask', 'valid_classes', 'draw_query',
                     'draw_negative_class', 'draw_negative_index', 'loss'):
            keep(f'reco/it{i}/{name}')
        gradient(f'reco/it{i}/grad')
    for i in range(4):
        run = f'u2pl/main/it{i}'
        for name in ('low_mask', 'high_mask', 'queue_len', 'queue',
                     'valid_classes', 'aligned', 'loss',
                     'aligned_run/perm', 'aligned_run/loss',
                     'aligned_run/draw_lengths', 'aligned_run/draws'):
            keep(f'{run}/{name}')
        gradient(f'{run}/aligned_run/grad')
        if full[f'{run}/aligned']:
            keep(f'{run}/draws')
            gradient(f'{run}/grad')
    np.savez_compressed(target, **kept)
    print(f'{len(kept)} arrays, {Path(target).stat().st_size} bytes')


if __name__ == '__main__':
    main(*sys.argv[1:])
