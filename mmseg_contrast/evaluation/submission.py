"""Predictions of a test split, as the server that scores it takes them."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS

from .formats import FORMATS

ARCHIVE = 'submission.zip'


@METRICS.register_module()
class SubmissionMetric(BaseMetric):
    """Writes one PNG per image and the archive to upload; scores nothing.

    Labels aren't needed. ``tools/test.py --server --out DIR`` uses the one
    that the config names::

        server_evaluator = dict(type='SubmissionMetric', format='acdc')

    The result is complete or not there: images are collected in
    ``DIR/.partial`` and moved when all are written, the archive last. Each
    rank writes its own images; all need the same file system.

    ================ ======================================== ===========
    format           folders in DIR and in the archive        image size
    ================ ======================================== ===========
    ``acdc``         ``labelTrainIds``                        1920 x 1080
    ``dark_zurich``  ``labelTrainIds`` and, for scores of     1920 x 1080
                     uncertainty, ``labelTrainIds_invalid``
                     and ``confidence``
    ``cityscapes``   ``labelIds``                             2048 x 1024
    ``plain``        ``predictions``: class ids as they are   any
    ================ ======================================== ===========

    A file is named after its image: ``GOPR0364_frame_000001_rgb_anon.png``.

    Args:
        format (str): 'acdc', 'dark_zurich', 'cityscapes' or 'plain'.
        field (str): Field of the sample that holds the prediction,
            'teacher_pred_sem_seg' for the teacher's.
        output_dir (str, optional): Where to write; ``--out`` sets it.
        archive (bool): Whether to write ``submission.zip`` too.
        prefix (str, optional): Folder in ``--out``, if there are several
            metrics.
        collect_device (str): 'cpu' or 'gpu', where ranks meet.
        keep_results (bool): Set by mmseg's ``tools/test.py --out``; results
            are always kept.

    Raises:
        ValueError: If results exist already, the classes or an image's size
            aren't the server's, or two images have one name.
    """

    def __init__(self,
                 format: str,
                 field: str = 'pred_sem_seg',
                 output_dir: str | None = None,
                 archive: bool = True,
                 prefix: str | None = None,
                 collect_device: str = 'cpu',
                 keep_results: bool = True) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if format not in FORMATS:
            raise ValueError(
                f'server_evaluator.format is {format!r}; known are '
                f'{", ".join(FORMATS)}.')
        self.name = format
        self.format = FORMATS[format]
        self.field = field
        self.archive = archive
        self._root = None if output_dir is None else Path(output_dir)
        self._sources: dict[str, str] = {}
        if self._root is not None:
            self._refuse_existing(self._root)

    @property
    def dataset_meta(self) -> dict | None:
        """What the dataset says of itself, its classes among it."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        # The test loop sets this before it predicts anything.
        wanted = self.format.classes
        if wanted and tuple(dataset_meta.get('classes') or ()) != wanted:
            raise ValueError(
                f"server_evaluator.format={self.name!r} needs the classes of "
                'Cityscapes in their order, but those of server_dataloader '
                f'are {dataset_meta.get("classes")}.')
        self._dataset_meta = dataset_meta

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Write the predictions of one batch.

        Args:
            data_batch (dict): Unused.
            data_samples (Sequence[dict]): Samples as dicts, with ``img_path``
                and ``ori_shape``.
        """
        folder = self._partial() / f'rank{get_rank()}'
        for sample in data_samples:
            source = str(sample['img_path'])
            name = f'{Path(source).stem}.png'
            _check_name(name, source, self._sources)
            images = self.format.images(self._prediction(sample, source))
            for kind, image in images.items():
                _write_png(folder / kind / name, image)
            self.results.append((name, source, get_rank()))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Put the images of all ranks together, on the first rank.

        Args:
            results (list): Name, image and rank of every file.

        Returns:
            dict[str, float]: Nothing; the server knows the scores.
        """
        root, partial = self._output_dir(), self._partial()
        self._refuse_existing(root)
        sources: dict[str, str] = {}
        ranks: dict[str, int] = {}
        for name, source, rank in results:
            _check_name(name, source, sources)
            ranks[name] = rank
        complete = partial / 'complete'
        shutil.rmtree(complete, ignore_errors=True)
        for kind in self.format.folders():
            (complete / kind).mkdir(parents=True)
            for name, rank in sorted(ranks.items()):
                written = partial / f'rank{rank}' / kind / name
                if not written.is_file():
                    raise ValueError(
                        f'{written}, written by another rank, is not there: '
                        '--out must be a folder that all machines share.')
                written.replace(complete / kind / name)
        entries = self.format.folders()
        if self.archive:
            _write_archive(complete, entries)
            entries = [*entries, ARCHIVE]
        for entry in entries:
            (complete / entry).replace(root / entry)
        shutil.rmtree(partial)
        print_log(
            f'{len(ranks)} predictions for the {self.name} format are in '
            f'{root / entries[-1]}', logger='current')
        return {}

    def _prediction(self, sample: dict, source: str) -> np.ndarray:
        """The predicted classes as uint8, ``(H, W)``, or a clear error."""
        if self.field not in sample:
            raise ValueError(
                f'The predictions have no field {self.field!r}, which '
                "server_evaluator.field names; set model.predict_with='both' "
                "for the teacher's.")
        classes = sample[self.field]['data'][0]
        size = tuple(classes.shape)
        if size != tuple(sample['ori_shape']):
            raise ValueError(
                f'The prediction of {source} has {_text(size)} pixels, the '
                f'image {_text(sample["ori_shape"])}.')
        if self.format.size not in (None, size):
            raise ValueError(
                f'{source} has {_text(size)} pixels, but the server of '
                f'server_evaluator.format={self.name!r} takes '
                f'{_text(self.format.size)}: predict the original images.')
        limit = len(self.format.classes) if self.format.classes else 256
        if classes.numel() and int(classes.max()) >= limit:
            raise ValueError(
                f'The prediction of {source} has class {int(classes.max())}, '
                f'which server_evaluator.format={self.name!r} cannot hold '
                f'(at most {limit - 1}).')
        return classes.cpu().numpy().astype(np.uint8)

    def _output_dir(self) -> Path:
        if self._root is None:
            raise ValueError(
                'SubmissionMetric needs output_dir, which '
                'tools/test.py --server --out DIR sets.')
        return self._root

    def _partial(self) -> Path:
        return self._output_dir() / '.partial'

    def _refuse_existing(self, root: Path) -> None:
        for entry in (*self.format.folders(), ARCHIVE):
            if (root / entry).exists():
                raise ValueError(
                    f'{root / entry} exists already: name another folder '
                    'with --out, or move it away.')


def _check_name(name: str, source: str, sources: dict[str, str]) -> None:
    """Refuse two images of one name; the loader may repeat an image."""
    other = sources.setdefault(name, source)
    if other != source:
        raise ValueError(
            f'{other} and {source} would both be written as {name}: names in '
            'server_dataloader must be unique over all of its folders.')


def _text(size: Sequence[int]) -> str:
    return f'{size[1]} x {size[0]}'


def _write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV's own choice makes files several times larger, and servers limit
    # the size of an archive.
    done, data = cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise OSError(f'{path} could not be encoded.')
    path.write_bytes(data.tobytes())


def _write_archive(folder: Path, kinds: Sequence[str]) -> None:
    # PNGs are compressed already.
    with zipfile.ZipFile(folder / ARCHIVE, 'w') as archive:
        for kind in kinds:
            for path in sorted((folder / kind).iterdir()):
                archive.write(path, f'{kind}/{path.name}')
