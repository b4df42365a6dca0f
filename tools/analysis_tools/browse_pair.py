"""Draw what the train loader delivers: one row per position.

Each row shows, after the pipeline, the images of every stream, the labels of
the labelled ones as an overlay, and the valid region where there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import init_default_scope

_IGNORED = 255
_GAP = 4


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config with a StreamDataset')
    parser.add_argument(
        '--out', default='work_dirs/browse_pair', help='folder of the PNGs')
    parser.add_argument(
        '--number', type=int, default=8, help='how many positions')
    parser.add_argument('--seed', type=int, help='seed of the draws; default: '
                        'that of the config')
    parser.add_argument(
        '--opacity', type=float, default=0.6, help='of the label colours')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction,
        help='changes of the config, key=value')
    return parser.parse_args()


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray,
            opacity: float) -> np.ndarray:
    """Lay label colours over an image; ignored pixels stay as they are.

    Args:
        image (np.ndarray): RGB, uint8 ``(h, w, 3)``.
        labels (np.ndarray): Class ids ``(h, w)``.
        palette (np.ndarray): RGB per class, ``(C, 3)``.
        opacity (float): 0 to 1.

    Returns:
        np.ndarray: RGB, uint8 ``(h, w, 3)``.
    """
    table = np.zeros((256, 3))
    table[:len(palette)] = palette
    mixed = image * (1 - opacity) + table[labels] * opacity
    known = (labels != _IGNORED)[..., None]
    return np.where(known, mixed, image).round().astype(np.uint8)


def panels(image, sample, palette: np.ndarray, opacity: float
           ) -> list[np.ndarray]:
    """Picture, label overlay and valid region of one sample.

    Args:
        image (Tensor): BGR, uint8 ``(3, h, w)``.
        sample (SegDataSample): Its data sample.
        palette (np.ndarray): RGB per class, ``(C, 3)``.
        opacity (float): Of the label colours.

    Returns:
        list[np.ndarray]: RGB pictures, uint8 ``(h, w, 3)``.
    """
    picture = image.permute(1, 2, 0).numpy()[..., ::-1]
    drawn = [np.ascontiguousarray(picture)]
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data[0].numpy()
        drawn.append(overlay(drawn[0], labels, palette, opacity))
    if 'valid_region' in sample:
        region = sample.valid_region.data[0].numpy().astype(bool)
        drawn.append(np.where(region[..., None], drawn[0], drawn[0] // 4))
    return drawn


def row(pictures: list[np.ndarray]) -> np.ndarray:
    """Put pictures of any size side by side on white.

    Args:
        pictures (list[np.ndarray]): RGB, uint8 ``(h, w, 3)``.

    Returns:
        np.ndarray: RGB, uint8.
    """
    height = max(p.shape[0] for p in pictures)
    padded = [
        np.pad(p, ((0, height - p.shape[0]), (0, _GAP), (0, 0)),
               constant_values=255) for p in pictures
    ]
    return np.concatenate(padded, axis=1)[:, :-_GAP]


def main() -> None:
    """Draw."""
    import mmcv
    from mmseg.registry import DATASETS

    import mmseg_contrast  # noqa: F401
    from mmseg_contrast.datasets import StreamDataset

    args = parse_args()
    config = Config.fromfile(args.config)
    if args.cfg_options is not None:
        config.merge_from_dict(args.cfg_options)
    init_default_scope(config.get('default_scope', 'mmseg'))
    dataset = DATASETS.build(config.train_dataloader.dataset)
    if not isinstance(dataset, StreamDataset):
        raise ValueError(
            '`train_dataloader.dataset` must be a StreamDataset, but is '
            f'{type(dataset).__name__}: use browse_dataset.py of mmseg')
    seed = args.seed
    if seed is None:
        seed = config.get('randomness', {}).get('seed') or 0
    dataset.set_seed(seed)
    palette = np.array(dataset.metainfo['palette'] or [[0, 0, 0]])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for position in range(args.number):
        item = dataset[position]
        pictures, names = [], []
        for name, images in item['inputs'].items():
            samples = item['data_samples'][name]
            if not isinstance(images, list):
                images, samples = [images], [samples]
            for image, sample in zip(images, samples, strict=True):
                pictures += panels(image, sample, palette, args.opacity)
                names.append(f'{name}: {sample.img_path}')
        file = out / f'position_{position:04d}.png'
        mmcv.imwrite(row(pictures)[..., ::-1], str(file))
        print_log(f'{file}  {" | ".join(names)}', logger='current')


if __name__ == '__main__':
    main()
