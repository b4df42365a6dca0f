"""Files of pseudo-labels: their names, their contents, their manifest."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

MANIFEST = 'pseudo_labels.json'
IGNORED = 255
#: Hard labels are PNGs of train ids, soft ones hold probabilities.
SUFFIXES = dict(hard='.png', soft='.npz')
_TOOL = 'tools/generate_pseudo_labels.py'


def label_file(folder: str, img_path: str, root: str, kind: str) -> str:
    """Where the pseudo-label of an image lies.

    Args:
        folder (str): The folder of pseudo-labels.
        img_path (str): Path of the image.
        root (str): Folder of images: below ``folder`` names are as below it.
        kind (str): 'hard' or 'soft'.

    Returns:
        str: The path; the image's suffix is exchanged. What has a scheme
        (``synthetic://a/b``) keeps all behind it; an image outside of the
        root keeps its own name alone.
    """
    scheme, found, rest = img_path.partition('://')
    name = rest if found else img_path
    inside = os.path.join(root.partition('://')[2] if '://' in root else root,
                          '')
    if inside and name.startswith(inside):
        name = name[len(inside):]
    elif not found and (root or os.path.isabs(name)):
        name = os.path.basename(name)
    return os.path.join(
        folder, os.path.splitext(name)[0] + SUFFIXES[kind])


def read_manifest(folder: str, where: str) -> dict[str, Any] | None:
    """What the tool wrote about a folder of pseudo-labels.

    Args:
        folder (str): The folder.
        where (str): Config key that names it, for messages.

    Returns:
        dict or None: None for a folder that another program made; its files
        are PNGs of train ids.

    Raises:
        ValueError: If the folder is missing, or not complete.
    """
    if not os.path.isdir(folder):
        raise ValueError(
            f'`{where}`: the folder {folder} does not exist; make it with '
            f'{_TOOL}')
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        return None
    try:
        manifest = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error})') from error
    if not isinstance(manifest, Mapping) or (
            manifest.get('kind') not in SUFFIXES):
        raise ValueError(f'{path} does not say kind = hard or soft: it is no '
                         f'manifest of {_TOOL}')
    if not manifest.get('complete'):
        raise ValueError(
            f'`{where}`: {folder} is not complete; run {_TOOL} again with '
            'the same arguments, it goes on where it stopped')
    return dict(manifest)


def check_classes(manifest: Mapping[str, Any],
                  classes: Sequence[str] | None, where: str) -> None:
    """Refuse labels of other classes than the run's.

    Args:
        manifest (dict): See :func:`read_manifest`.
        classes (sequence[str], optional): Those of the run.
        where (str): Config key of the folder, for the message.

    Raises:
        ValueError: If they differ.
    """
    theirs = manifest.get('classes')
    if theirs and classes and list(theirs) != list(classes):
        raise ValueError(
            f'`{where}` holds labels of the classes {list(theirs)}, but the '
            f'stream has {list(classes)}')


def encode_hard(labels: np.ndarray) -> bytes:
    """A PNG of train ids.

    Args:
        labels (np.ndarray): uint8 ``(h, w)``; 255 is ignored.
    """
    done, data = cv2.imencode('.png', labels)
    assert done
    return data.tobytes()


def decode_hard(data: bytes) -> np.ndarray:
    """The inverse of :func:`encode_hard`.

    Args:
        data (bytes): A whole PNG file.

    Returns:
        np.ndarray: uint8 ``(h, w)``.

    Raises:
        ValueError: If it is truncated, or not one id per pixel.
    """
    labels = None
    if b'IEND' in data[-64:]:
        labels = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if labels is None:
        raise ValueError('it is no whole PNG')
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError('it is no PNG with one uint8 id per pixel')
    return labels


def encode_soft(probs: torch.Tensor, stride: int) -> bytes:
    """Probabilities, averaged over cells and rounded to 1/255.

    Args:
        probs (Tensor): ``(C, h, w)``.
        stride (int): Side of a cell in pixels, >= 1.

    Returns:
        bytes: An npz file with ``probs`` uint8 ``(C, h / stride, w /
        stride)`` (rounded up) and ``size`` ``(h, w)``. The error is 1/510 at
        most, besides what averaging takes away.
    """
    height, width = probs.shape[1:]
    small = (-(-height // stride), -(-width // stride))
    cells = F.interpolate(probs[None].float(), small, mode='area')[0]
    rounded = (cells * 255).round().to(torch.uint8).cpu().numpy()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, probs=rounded, size=np.array([height, width], np.int32))
    return buffer.getvalue()


def decode_soft(data: bytes) -> np.ndarray:
    """The inverse of :func:`encode_soft`, resized bilinearly.

    Args:
        data (bytes): A whole npz file.

    Returns:
        np.ndarray: uint8 ``(h, w, C)``; sums over C are about 255.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            probs, size = file['probs'], file['size']
    except Exception as error:  # zipfile, zlib and numpy have many
        raise ValueError(f'it is no whole npz file ({error})') from error
    if probs.ndim != 3 or probs.dtype != np.uint8 or size.shape != (2, ):
        raise ValueError('it holds no uint8 probabilities (C, h, w)')
    height, width = map(int, size)
    cells = np.ascontiguousarray(probs.transpose(1, 2, 0))
    if cells.shape[:2] == (height, width):
        return cells
    resized = cv2.resize(cells, (width, height),
                         interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, -1)
