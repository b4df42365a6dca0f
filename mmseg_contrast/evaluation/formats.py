"""What the servers of test splits take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mmseg.utils import cityscapes_classes

CITYSCAPES_CLASSES = tuple(cityscapes_classes())
# cityscapesScripts, helpers/labels.py
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27,
                  28, 31, 32, 33)


@dataclass(frozen=True)
class SubmissionFormat:
    """The files that hold one predicted image.

    Args:
        folder (str): Folder of the label maps, on disk and in the archive.
        classes (tuple[str, ...], optional): The classes that the server
            scores, in the order of its train ids; None for any.
        ids (tuple[int, ...], optional): Written instead of 0, 1, 2, ...
        size (tuple[int, int], optional): Height and width of its images.
        uncertainty (bool): Whether the server also reads the folders
            ``<folder>_invalid`` and ``confidence``.
    """

    folder: str
    classes: tuple[str, ...] | None = None
    ids: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    uncertainty: bool = False

    def images(self, prediction: np.ndarray) -> dict[str, np.ndarray]:
        """Encode a prediction.

        Dark Zurich's server scores uncertainty too. Nothing is declared
        invalid and all pixels are fully confident, for which its scores of
        uncertainty equal the plain IoU.

        Args:
            prediction (np.ndarray): Class of every pixel, uint8 ``(H, W)``.

        Returns:
            dict[str, np.ndarray]: Folder and image ``(H, W)``, uint8 or (the
                confidence, 0 to 65535) uint16.
        """
        if self.ids is not None:
            prediction = np.array(self.ids, np.uint8)[prediction]
        images = {self.folder: prediction}
        if self.uncertainty:
            images[f'{self.folder}_invalid'] = prediction
            images['confidence'] = np.full(
                prediction.shape, 65535, np.uint16)
        return images

    def folders(self) -> list[str]:
        """Names of all folders."""
        return list(self.images(np.zeros((1, 1), np.uint8)))


# Sources of the rules: docs/evaluation.md.
FORMATS = dict(
    acdc=SubmissionFormat(
        'labelTrainIds', CITYSCAPES_CLASSES, size=(1080, 1920)),
    dark_zurich=SubmissionFormat(
        'labelTrainIds', CITYSCAPES_CLASSES, size=(1080, 1920),
        uncertainty=True),
    cityscapes=SubmissionFormat(
        'labelIds', CITYSCAPES_CLASSES, ids=CITYSCAPES_IDS,
        size=(1024, 2048)),
    plain=SubmissionFormat('predictions'))
