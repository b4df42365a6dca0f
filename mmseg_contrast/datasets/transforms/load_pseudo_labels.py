"""Pseudo-labels from files, beside the image and never as ground truth."""

from __future__ import annotations

from pathlib import Path

from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from ..pseudo_label_files import (
    IGNORED,
    SUFFIXES,
    decode_hard,
    decode_soft,
    label_file,
)

HARD_FIELD = 'pseudo_label'
SOFT_FIELD = 'pseudo_probs'


@TRANSFORMS.register_module()
class LoadPseudoLabels(BaseTransform):
    """Read the pseudo-label of an image from its file.

    The field ``pseudo_label`` (hard, uint8 ``(h, w)``) or ``pseudo_probs``
    (soft, uint8 ``(h, w, C)``) is a segmentation field: resizes (nearest),
    crops and flips carry it with the image. ``gt_seg_map`` is not touched. A
    stream inserts it behind the transform that loads the image, see
    ``streams.<name>.pseudo_labels``.

    Args:
        folder (str): Where ``tools/generate_pseudo_labels.py`` wrote.
        image_root (str): Folder of the images; names below it are the names
            below ``folder``.
        kind (str): 'hard' or 'soft'.
        num_classes (int, optional): Refuse ids above; None: don't check.

    Raises:
        ValueError: If the kind is neither.
    """

    def __init__(self,
                 folder: str,
                 image_root: str = '',
                 kind: str = 'hard',
                 num_classes: int | None = None) -> None:
        if kind not in SUFFIXES:
            raise ValueError(
                f'LoadPseudoLabels.kind must be one of {sorted(SUFFIXES)}, '
                f'but is {kind!r}')
        self.folder = folder
        self.image_root = image_root
        self.kind = kind
        self.num_classes = num_classes

    def transform(self, results: dict) -> dict:
        """Add the field.

        Args:
            results (dict): Results with a loaded ``img``.

        Returns:
            dict: The same results.

        Raises:
            ValueError: If the file is missing, broken, of another size or of
                other classes; names it.
        """
        path = label_file(
            self.folder, results['img_path'], self.image_root, self.kind)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f'the pseudo-label file {path} cannot be read '
                             f'({error.strerror})') from error
        try:
            field = (decode_hard if self.kind == 'hard' else decode_soft)(
                data)
        except ValueError as error:
            raise ValueError(
                f'the pseudo-label file {path} is broken: {error}') from error
        size = results['img'].shape[:2]
        if field.shape[:2] != size:
            raise ValueError(
                f'the pseudo-label file {path} is {field.shape[1]} x '
                f'{field.shape[0]} pixels, but its image is {size[1]} x '
                f'{size[0]}')
        self._check_classes(field, path)
        name = HARD_FIELD if self.kind == 'hard' else SOFT_FIELD
        results[name] = field
        # a new list: the one of the dataset's own entry stays as it is
        results['seg_fields'] = [*results.get('seg_fields', []), name]
        return results

    def _check_classes(self, field, path: str) -> None:
        if self.num_classes is None:
            return
        if self.kind == 'soft':
            wrong = field.shape[2] != self.num_classes
            theirs = f'{field.shape[2]} classes'
        else:
            ids = field[field != IGNORED]
            highest = int(ids.max()) if ids.size else 0
            wrong = highest >= self.num_classes
            theirs = f'the id {highest}'
        if wrong:
            raise ValueError(
                f'the pseudo-label file {path} holds {theirs}, but the run '
                f'has {self.num_classes} classes')

    def __repr__(self) -> str:
        """Short text: what is read."""
        return f'{type(self).__name__}({self.kind}, {self.folder!r})'
