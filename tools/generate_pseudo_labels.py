"""Label a target stream with a trained model, for a later stage of training.

    python tools/generate_pseudo_labels.py CONFIG CHECKPOINT --out DIR
    python tools/generate_pseudo_labels.py CONFIG CHECKPOINT --out DIR \
        --class-thresholds spcl
    python tools/generate_pseudo_labels.py CONFIG CHECKPOINT --out DIR \
        --policy soft

Writes one file for each image, under the image's own relative name, and
``pseudo_labels.json``. A stream reads them with
``streams=dict(target=dict(..., pseudo_labels='DIR'))``. No label file of the
target is read. Stopped, it goes on with the same command.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmcv.transforms import LoadAnnotations  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.utils import ProgressBar  # noqa: E402
from mmseg.registry import MODELS, TRANSFORMS  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from mmseg_contrast.adaptation import RESERVED_ROOTS  # noqa: E402
from mmseg_contrast.adaptation.pseudo_labels.class_thresholds import (  # noqa: E402, E501
    RULES,
)
from mmseg_contrast.datasets.checks import build_dataset  # noqa: E402
from mmseg_contrast.datasets.pseudo_label_files import (  # noqa: E402
    IGNORED,
    MANIFEST,
    decode_hard,
    decode_soft,
    encode_hard,
    encode_soft,
    label_file,
)
from mmseg_contrast.datasets.pseudo_labels import (  # noqa: E402
    image_root,
    label_folders,
)
from mmseg_contrast.datasets.reader import refuse_truncated  # noqa: E402
from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402
from mmseg_contrast.environment import allow_checkpoint_classes  # noqa: E402
from mmseg_contrast.files import written_whole  # noqa: E402
from mmseg_contrast.models import batched_slide  # noqa: E402
from mmseg_contrast.ops import (  # noqa: E402
    class_thresholds,
    confidence_histogram,
    hard_labels,
    normalized,
    over_thresholds,
)

#: Bins of confidences: thresholds lie 1 / BINS below the quantile at most.
BINS = 1 << 16
_SCORES = ('Mask2FormerHead', 'MaskFormerHead')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0])
    parser.add_argument('config', help='config of the training run')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--out', required=True, help='folder of the labels')
    parser.add_argument(
        '--stream', default='target',
        help='which stream of train_dataloader to label (default: target)')
    parser.add_argument(
        '--dataloader', default='train_dataloader',
        help='the loader whose data are labelled')
    parser.add_argument(
        '--policy', choices=('hard', 'soft'), default='hard',
        help='PNGs of class ids, or probabilities')
    parser.add_argument(
        '--threshold', type=float,
        help='hard: pixels below get 255 (default: 0.9)')
    parser.add_argument(
        '--class-thresholds', choices=sorted(RULES),
        help='hard: one threshold for each class, from the whole set')
    parser.add_argument(
        '--portion', type=float,
        help='with --class-thresholds: which part of the pixels predicted as '
        'a class is kept (default: cbst 0.2, spcl 0.5)')
    parser.add_argument(
        '--soft-stride', type=int, default=4,
        help='soft: side of the cells that are averaged, in pixels')
    parser.add_argument(
        '--predict-with', choices=('student', 'teacher'), default='student',
        help='whose predictions; a teacher is the first in model.teachers')
    parser.add_argument(
        '--device', help='such as cuda:0 or cpu (default: a GPU if there is)')
    parser.add_argument(
        '--workers', type=int, default=2, help='processes that load images')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction,
        help='override settings of the config, as key=value')
    return parser.parse_args()


# -- what to label, and with what -----------------------------------------


@dataclass
class Image:
    """One image to label.

    Args:
        dataset (BaseDataset): Its dataset, with the test pipeline.
        index (int): Index in it.
        path (str): File of its pseudo-label.
    """

    dataset: Any
    index: int
    path: str


class Images(Dataset):
    """Images after the test pipeline, for a loader.

    Args:
        images (list[Image]): Which ones.
    """

    def __init__(self, images: list[Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict:
        image = self.images[number]
        path = image.dataset.get_data_info(image.index)['img_path']
        try:
            refuse_truncated(path)
            return image.dataset[image.index]
        except Exception as error:
            raise ValueError(f'cannot read the image {path} '
                             f'({type(error).__name__}: {error})') from error


def without_labels(pipeline: list) -> list:
    """A test pipeline without what loads annotations.

    Args:
        pipeline (list): Configs of transforms.
    """
    kept = []
    for step in pipeline:
        kind = step['type']
        kind = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(kind, type) and issubclass(kind, LoadAnnotations)):
            kept.append(copy.deepcopy(dict(step)))
    return kept


def innermost(dataset: Any) -> Iterator[Any]:
    """Configs of the datasets inside wrappers, to be changed in place.

    Args:
        dataset (dict): Config of a dataset or of wrappers around some.

    Yields:
        dict: Every innermost config.
    """
    inner = list(dataset.get('datasets') or ())
    if 'dataset' in dataset:
        inner.append(dataset['dataset'])
    for one in inner:
        yield from innermost(one)
    if not inner:
        yield dataset


def test_pipeline(cfg: Config) -> list:
    """How the config loads whole images, without labels.

    Args:
        cfg (Config): ``test_pipeline``, or the pipeline of the data of
            ``test_dataloader``.

    Raises:
        ValueError: If there is neither.
    """
    pipeline = cfg.get('test_pipeline')
    if pipeline is None and cfg.get('test_dataloader'):
        pipeline = next(
            (one['pipeline'] for one in innermost(
                cfg.test_dataloader.dataset) if 'pipeline' in one), None)
    if not pipeline:
        raise ValueError(
            'the config has neither test_pipeline nor a test_dataloader with '
            'a pipeline: add test_pipeline, how whole images are loaded.')
    return without_labels(pipeline)


def dataset_configs(cfg: Config, loader: str, stream: str) -> list[Any]:
    """Configs of the datasets to label.

    Args:
        cfg (Config): The config.
        loader (str): ``train_dataloader`` or another one.
        stream (str): The stream, where the loader has streams.

    Raises:
        ValueError: If there is no such loader or stream.
    """
    if not cfg.get(loader):
        raise ValueError(f'the config has no {loader}; set --dataloader.')
    dataset = cfg[loader].dataset
    if 'streams' not in dataset:
        return [copy.deepcopy(dataset)]
    if stream not in dataset.streams:
        raise ValueError(f'{loader}.dataset.streams has no {stream!r}; set '
                         f'--stream to one of {sorted(dataset.streams)}.')
    options = dataset.streams[stream]
    one = options.get('dataset')
    return copy.deepcopy(
        list(options.get('datasets') or ()) if one is None else [one])


def list_images(configs: list[Any], pipeline: list, stream: str, out: str,
                kind: str) -> list[Image]:
    """Every image once, with the file of its label.

    Args:
        configs (list): Configs of datasets.
        pipeline (list): What they are to be read with.
        stream (str): Name of the stream, for messages.
        out (str): Folder of the labels.
        kind (str): 'hard' or 'soft'.

    Raises:
        ValueError: If nothing is found or two images have one name.
    """
    built = []
    for config in configs:
        for one in innermost(config):
            one['pipeline'] = copy.deepcopy(pipeline)
        built.append(build_dataset(config, stream))
    images = []
    taken: dict[str, str] = {}
    for dataset, folder in label_folders(built, out):
        root = image_root(dataset)
        for index in range(len(dataset)):
            source = dataset.get_data_info(index)['img_path']
            path = label_file(folder, source, root, kind)
            if path in taken:
                raise ValueError(f'{source} and {taken[path]} would both get '
                                 f'the pseudo-label {path}: rename one.')
            taken[path] = source
            images.append(Image(dataset, index, path))
    return images


def load_model(cfg: Config, checkpoint: Path, who: str,
               device: torch.device) -> nn.Module:
    """The plain segmentor with the weights of student or teacher.

    Args:
        cfg (Config): Of a UDASegmentor or of a stock model.
        checkpoint (Path): Of either.
        who (str): 'student' or 'teacher'.
        device (torch.device): Where it runs.

    Returns:
        nn.Module: In evaluation mode.

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    config = cfg.model
    teacher = None
    if 'segmentor' in config:
        if who == 'teacher':
            if not config.get('teachers'):
                raise ValueError('--predict-with teacher: the config has '
                                 'nothing in model.teachers.')
            teacher = next(iter(config.teachers))
        config = config.segmentor
        if not config.get('data_preprocessor'):
            config = dict(config, data_preprocessor=cfg.get(
                'data_preprocessor'))
    elif who == 'teacher':
        raise ValueError('--predict-with teacher needs a config of a '
                         'UDASegmentor, which has teachers.')
    model = MODELS.build(config)
    state = read_weights(checkpoint, teacher)
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f'{checkpoint} does not fit the model of the config '
                         f'({str(error).splitlines()[-1].strip()}).'
                         ) from error
    lacking = [key for key in missing if not key.startswith('auxiliary')]
    if lacking:
        raise ValueError(
            f'{checkpoint} lacks {len(lacking)} weights of the model, the '
            f'first is {lacking[0]}: is it of another config?')
    return model.to(device).eval()


def read_weights(checkpoint: Path, teacher: str | None) -> dict[str, Tensor]:
    """The weights of one model in a checkpoint.

    Args:
        checkpoint (Path): The file.
        teacher (str, optional): Name of a teacher; None: the student's, or a
            plain model's.

    Raises:
        ValueError: If it is no checkpoint, or has no such teacher.
    """
    if not checkpoint.is_file():
        raise ValueError(f'there is no checkpoint {checkpoint}.')
    allow_checkpoint_classes()
    try:
        file = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError,
            KeyError) as error:
        raise ValueError(f'{checkpoint} is no checkpoint that torch can load '
                         f'safely ({str(error).splitlines()[0]}).') from error
    state = file.get('state_dict', file) if isinstance(file, Mapping) else {}
    if teacher is None:
        return {key: value for key, value in state.items()
                if key.split('.')[0] not in RESERVED_ROOTS}
    prefix = f'teachers.{teacher}.model.'
    found = {key[len(prefix):]: value for key, value in state.items()
             if key.startswith(prefix)}
    if not found:
        raise ValueError(f'{checkpoint} has no weights of the teacher '
                         f'{teacher!r}: leave --predict-with out.')
    return found


# -- predictions ----------------------------------------------------------


def probabilities(model: nn.Module, batch: dict) -> Tensor:
    """Class probabilities of one image, at its own size.

    Args:
        model (nn.Module): A segmentor.
        batch (dict): Of one image, as a loader gives it.

    Returns:
        Tensor: float32, ``(C, H, W)``.
    """
    with batched_slide(model):
        scores = model.test_step(batch)[0].seg_logits.data.float()
    head = model.decode_head
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if scores.shape[0] == 1:  # mmseg has applied the sigmoid
        return torch.cat([1 - scores, scores])
    if any(one.__name__ in _SCORES for one in type(head).__mro__):
        return normalized(scores.clamp_min(0)[None])[0]
    return scores.softmax(0)


def predictions(model: nn.Module, images: list[Image], workers: int,
                title: str) -> Iterator[tuple[Image, Tensor]]:
    """Probabilities of one image after the other, with a progress bar.

    Args:
        model (nn.Module): A segmentor.
        images (list[Image]): Which ones.
        workers (int): Processes that load.
        title (str): Shown before the bar.

    Yields:
        tuple: The image and its probabilities ``(C, H, W)``.
    """
    if not images:
        return
    sys.stdout.write(f'{title}: {len(images)} images\n')
    loader = DataLoader(Images(images), batch_size=1, num_workers=workers,
                        collate_fn=pseudo_collate)
    bar = ProgressBar(len(images))
    for image, batch in zip(images, loader, strict=True):
        with torch.no_grad():
            yield image, probabilities(model, batch)
        bar.update()
    sys.stdout.write('\n')


def measure_thresholds(model: nn.Module, images: list[Image], workers: int,
                       rule: str, portion: float, num_classes: int
                       ) -> tuple[list[float], list[int]]:
    """The threshold of each class over the whole set.

    Args:
        model (nn.Module): A segmentor.
        images (list[Image]): The set.
        workers (int): Processes that load.
        rule (str): 'cbst' or 'spcl'.
        portion (float): In (0, 1].
        num_classes (int): Number of classes C.

    Returns:
        tuple: Thresholds, 1 / 65536 below the quantile at most, and pixels
        that were predicted as each class.
    """
    counts = torch.zeros(num_classes, BINS, dtype=torch.int64)
    for _, probs in predictions(model, images, workers,
                                'first pass, thresholds'):
        confidence, labels = hard_labels(probs[None])
        counts += confidence_histogram(
            confidence, labels, num_classes, BINS).cpu()
    ceiling = RULES[rule][1]
    return (class_thresholds(counts, portion, ceiling).tolist(),
            counts.sum(1).tolist())


def label_bytes(probs: Tensor, manifest: Mapping[str, Any]) -> bytes:
    """The file of one image.

    Args:
        probs (Tensor): ``(C, H, W)``.
        manifest (dict): Says how.
    """
    if manifest['kind'] == 'soft':
        return encode_soft(probs, manifest['stride'])
    thresholds = torch.tensor(manifest['thresholds'], device=probs.device)
    ratio = bool(manifest['rule'] and RULES[manifest['rule']][2])
    labels, _, sure = over_thresholds(probs[None], thresholds, ratio)
    labels = labels.where(sure, labels.new_full((), IGNORED))
    return encode_hard(labels[0].to(torch.uint8).cpu().numpy())


def class_counts(data: bytes, kind: str, num_classes: int) -> np.ndarray:
    """Labelled pixels of each class in one file, the ignored ones last.

    Args:
        data (bytes): The file.
        kind (str): 'hard' or 'soft'.
        num_classes (int): Number of classes C.

    Returns:
        np.ndarray: int64 ``(C + 1,)``.
    """
    labels = decode_hard(data) if kind == 'hard' else (
        decode_soft(data).argmax(2))
    counts = np.bincount(labels.ravel(), minlength=256)
    return np.append(counts[:num_classes], counts[IGNORED])


# -- the manifest ---------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Args:
        args (argparse.Namespace): The command line.

    Raises:
        ValueError: Naming the option.
    """
    if args.policy == 'soft' and (
            args.threshold is not None or args.class_thresholds):
        raise ValueError('--threshold and --class-thresholds are for --policy '
                         'hard; soft labels keep all probabilities.')
    if args.threshold is not None and args.class_thresholds:
        raise ValueError('give --threshold or --class-thresholds, not both.')
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f'--threshold must lie in [0, 1], got '
                         f'{args.threshold}.')
    if args.portion is not None and not args.class_thresholds:
        raise ValueError('--portion needs --class-thresholds.')
    if args.portion is not None and not 0 < args.portion <= 1:
        raise ValueError(f'--portion must lie in (0, 1], got {args.portion}.')
    if args.soft_stride < 1:
        raise ValueError(f'--soft-stride must be at least 1, got '
                         f'{args.soft_stride}.')


def new_manifest(args: argparse.Namespace, cfg: Config,
                 classes: list[str] | None, num_images: int
                 ) -> dict[str, Any]:
    """What identifies this run of the tool.

    Args:
        args (argparse.Namespace): The command line.
        cfg (Config): The config.
        classes (list[str], optional): Names of the classes.
        num_images (int): How many images there are.
    """
    with open(args.checkpoint, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    settings = json.dumps(
        [cfg.model.to_dict(), test_pipeline(cfg)], sort_keys=True,
        default=str)
    rule = args.class_thresholds
    portion = None
    if rule:
        portion = RULES[rule][0] if args.portion is None else args.portion
    return dict(
        kind=args.policy,
        checkpoint=args.checkpoint,
        checkpoint_sha256=digest.hexdigest(),
        config=args.config,
        config_sha256=hashlib.sha256(settings.encode()).hexdigest(),
        predict_with=args.predict_with,
        stream=args.stream,
        rule=rule,
        portion=portion,
        threshold=None if rule or args.policy == 'soft' else (
            0.9 if args.threshold is None else args.threshold),
        stride=args.soft_stride if args.policy == 'soft' else None,
        classes=classes,
        images=num_images)


def resumed(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier start of the same run, or the new one.

    Args:
        out (Path): Folder of the labels.
        manifest (dict): The new one.

    Raises:
        ValueError: If the folder holds something else.
    """
    path = out / MANIFEST
    if not path.is_file():
        if out.is_dir() and any(
                not one.name.startswith('.') for one in out.iterdir()):
            raise ValueError(f'{out} is not empty and has no {MANIFEST}: '
                             'choose another --out.')
        return manifest
    try:
        old = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}).') from error
    # A path may be written in another way; its contents are compared.
    named = set(manifest) - {'checkpoint', 'config'}
    differing = sorted(
        key for key in named if old.get(key) != manifest[key])
    if differing:
        raise ValueError(
            f'{out} holds labels of another run ({differing[0]} was '
            f'{old.get(differing[0])!r} and is {manifest[differing[0]]!r}): '
            'remove it or choose another --out.')
    return old


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest at once.

    Args:
        out (Path): Folder of the labels.
        manifest (dict): What to write.
    """
    with written_whole(out / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + '\n').encode())


def generate(args: argparse.Namespace) -> Path:
    """Label every image that has no label yet.

    Args:
        args (argparse.Namespace): The command line.

    Returns:
        Path: The manifest.

    Raises:
        ValueError: For every mistake of the user.
    """
    check_options(args)
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    device = torch.device(
        args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    model = load_model(cfg, Path(args.checkpoint), args.predict_with, device)
    num_classes = model.decode_head[-1].num_classes if isinstance(
        model.decode_head, nn.ModuleList) else model.decode_head.num_classes
    if num_classes > IGNORED:
        raise ValueError(f'files hold ids below {IGNORED}, but the model has '
                         f'{num_classes} classes.')
    images = list_images(
        dataset_configs(cfg, args.dataloader, args.stream),
        test_pipeline(cfg), args.stream, args.out, args.policy)
    out = Path(args.out)
    manifest = resumed(out, new_manifest(
        args, cfg, class_names(cfg, args, images, num_classes),
        len(images)))
    if 'thresholds' not in manifest and args.policy == 'hard':
        if manifest['rule']:
            manifest['thresholds'], manifest['predicted'] = (
                measure_thresholds(
                    model, images, args.workers, manifest['rule'],
                    manifest['portion'], num_classes))
        else:
            manifest['thresholds'] = [manifest['threshold']] * num_classes
    manifest['complete'] = False
    write_manifest(out, manifest)

    counts = np.zeros(num_classes + 1, np.int64)
    done = [one for one in images if os.path.isfile(one.path)]
    for one in done:
        counts += class_counts(
            Path(one.path).read_bytes(), args.policy, num_classes)
    todo = [one for one in images if not os.path.isfile(one.path)]
    for one, probs in predictions(model, todo, args.workers, 'labels'):
        data = label_bytes(probs, manifest)
        with written_whole(Path(one.path)) as file:
            file.write(data)
        counts += class_counts(data, args.policy, num_classes)

    total = max(int(counts.sum()), 1)
    manifest['shares'] = (counts[:-1] / total).round(6).tolist()
    manifest['ignored'] = round(float(counts[-1] / total), 6)
    manifest['complete'] = True
    write_manifest(out, manifest)
    return out / MANIFEST


def class_names(cfg: Config, args: argparse.Namespace, images: list[Image],
                num_classes: int) -> list[str] | None:
    """The classes of the run: of the first labelled stream, or the data.

    Args:
        cfg (Config): The config.
        args (argparse.Namespace): The command line.
        images (list[Image]): What is labelled.
        num_classes (int): Of the model.

    Returns:
        list[str] or None: None if their number is not the model's.
    """
    found: list[Any] = [images[0].dataset.metainfo.get('classes')]
    streams = cfg[args.dataloader].dataset.get('streams') or {}
    for options in streams.values():
        label_map = options.get('label_map')
        if label_map:
            found.insert(0, label_map.get('classes'))
    for names in found:
        if names and len(names) == num_classes:
            return list(names)
    return None


def main() -> None:
    """Label what the command line names."""
    args = parse_args()
    path = generate(args)
    manifest = json.loads(path.read_text(encoding='utf-8'))
    names = manifest['classes'] or range(len(manifest['shares']))
    for number, (name, share) in enumerate(
            zip(names, manifest['shares'], strict=True)):
        line = f'{name!s:<20} {share:8.3%}'
        if 'thresholds' in manifest:
            line += f'   threshold {manifest["thresholds"][number]:.4f}'
        sys.stdout.write(line + '\n')
    sys.stdout.write(f'{"ignored":<20} {manifest["ignored"]:8.3%}\n{path}\n')


if __name__ == '__main__':
    with one_sentence():
        main()
