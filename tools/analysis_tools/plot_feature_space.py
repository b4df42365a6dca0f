"""Draw embeddings of pixels by class and domain, with the prototypes.

usage: python tools/analysis_tools/plot_feature_space.py CONFIG CHECKPOINT
       --out FILE.png [--method tsne] [--views source val]

Views are the streams of a StreamDataset and 'val', the validation images
with their true labels; of other datasets 'train' and 'val'. Views without
labels are coloured by what the net predicts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import init_default_scope


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', required=True, help='PNG to write')
    parser.add_argument(
        '--head', help="a ContrastHead, such as 'aux' or 'aux_0', or "
        "'backbone'; default: the first ContrastHead, else 'backbone'")
    parser.add_argument(
        '--views', nargs='+', help='default: all streams, or train and val')
    parser.add_argument('--method', choices=('pca', 'tsne'), default='pca')
    parser.add_argument('--pixels', type=int, default=2000, help='in all')
    parser.add_argument(
        '--images', type=int, default=16, help='of each view')
    parser.add_argument(
        '--teacher', help='name of a teacher to embed with (default: the '
        'student)')
    parser.add_argument('--seed', type=int, default=0, help='of the draws')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction,
        help='changes of the config, key=value')
    return parser.parse_args()


def build_model(config: Config, checkpoint: str, device: str) -> Any:
    """The model of a config with the weights of a checkpoint.

    Args:
        config (Config): The config.
        checkpoint (str): Path or address.
        device (str): Where to.

    Returns:
        nn.Module: In evaluation mode.
    """
    from mmengine.runner import load_checkpoint
    from mmseg.registry import MODELS

    from mmseg_contrast.environment import allow_checkpoint_classes

    if config.get('data_preprocessor') is not None:
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    model = MODELS.build(config.model)
    allow_checkpoint_classes()
    load_checkpoint(model, checkpoint, map_location='cpu')
    return model.to(device).eval()


def samples(config: Config, dataset: Any, view: str, number: int, seed: int
            ) -> tuple[list[dict], bool]:
    """Packed samples of a view.

    Args:
        config (Config): The config.
        dataset (Dataset): The training data, built.
        view (str): A stream, 'train' or 'val'.
        number (int): Samples at most.
        seed (int): Of the draws.

    Returns:
        tuple: Samples, and whether they are labelled.

    Raises:
        ValueError: If there is no such view.
    """
    from mmseg.registry import DATASETS

    from mmseg_contrast.datasets import StreamDataset
    from mmseg_contrast.datasets.seeding import seed_everything

    streams = dataset.streams if isinstance(dataset, StreamDataset) else {}
    if view in streams:
        stream = streams[view]
        return [stream.draw(seed, at // stream.ratio, at % stream.ratio)
                for at in range(min(number, len(stream)))], stream.labelled
    loader = config.get('val_dataloader')
    if view == 'train' and not streams:
        chosen = dataset
    elif view == 'val' and loader is not None:
        chosen = DATASETS.build(loader.dataset)
    else:
        known = list(streams) or ['train']
        raise ValueError(
            f'--views {view}: the config has {[*known, "val"]}'
            f'{"" if loader is not None else ", without val_dataloader"}')
    places = np.linspace(0, len(chosen) - 1, min(number, len(chosen)))
    items = []
    for place in places.round().astype(int):
        seed_everything(seed, view, int(place))
        items.append(chosen[int(place)])
    return items, True


def to_batch(model: Any, view: str, sample: dict, labelled: bool) -> Any:
    """One image as the model gets it.

    Args:
        model (nn.Module): The model.
        view (str): Name of the view.
        sample (dict): A packed sample.
        labelled (bool): Whether its labels are used.

    Returns:
        Batch: Of one image.
    """
    from mmseg_contrast.engine.hooks.feature_space import Batch

    done = model.data_preprocessor(dict(
        inputs=[sample['inputs']], data_samples=[sample['data_samples']]))
    images = done['inputs']
    high, wide = sample['inputs'].shape[-2:]
    border = (0, images.shape[3] - wide, 0, images.shape[2] - high)
    inside = F.pad(torch.ones(1, high, wide, device=images.device),
                   border).bool()
    if not labelled:
        return Batch(view, images, valid=inside)
    # The labels of test pipelines have the size of the file.
    truth = sample['data_samples'].gt_sem_seg.data.unsqueeze(0)
    truth = F.interpolate(truth.float(), (high, wide), mode='nearest')[0]
    return Batch(view, images, F.pad(
        truth.long().to(images.device), border, value=255), 'labels')


def main() -> None:
    """Draw."""
    from mmseg.registry import DATASETS

    import mmseg_contrast  # noqa: F401
    from mmseg_contrast.datasets import StreamDataset
    from mmseg_contrast.datasets.seeding import guarded_random_state
    from mmseg_contrast.engine.hooks.feature_space import (
        draw,
        find_head,
        write_png,
    )
    from mmseg_contrast.engine.hooks.panel import default_palette
    from mmseg_contrast.engine.looking import student_of

    args = parse_args()
    config = Config.fromfile(args.config)
    if args.cfg_options is not None:
        config.merge_from_dict(args.cfg_options)
    init_default_scope(config.get('default_scope', 'mmseg'))
    model = build_model(config, args.checkpoint, args.device)
    name, own = find_head(model, args.head, '--head')
    net = student_of(model)
    if args.teacher is not None:
        if args.teacher not in getattr(model, 'teachers', {}):
            raise ValueError(
                f'--teacher {args.teacher} is not in model.teachers')
        net = model.teachers[args.teacher].model
    dataset = DATASETS.build(config.train_dataloader.dataset)
    streams = isinstance(dataset, StreamDataset)
    views = args.views or (
        list(dataset.streams) if streams else ['train', 'val'])
    batches = []
    for view in views:
        with guarded_random_state():
            found, labelled = samples(
                config, dataset, view, args.images, args.seed)
        batches += [to_batch(model, view, one, labelled) for one in found]
    meta = dataset.metainfo
    classes = meta.get('classes') or [
        str(c) for c in range(net.num_classes)]
    palette = meta.get('palette') or default_palette(len(classes))
    who = '' if args.teacher is None else f', teacher {args.teacher}'
    image = draw(
        net, find_head(net, name, '--head')[1], own, batches, args.pixels,
        classes, np.array(palette, np.uint8), args.method,
        f'features of {name}{who}, {Path(args.checkpoint).name}', args.seed)
    if image is None:
        raise ValueError('no pixel of these images has a label')
    write_png(image, Path(args.out))
    print_log(f'written {args.out}', logger='current')


if __name__ == '__main__':
    main()
