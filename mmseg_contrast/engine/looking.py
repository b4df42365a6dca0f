"""Looking at a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from ..adaptation.students import class_probabilities, contrast_heads
from ..contrast import BatchBank
from ..datasets.seeding import guarded_random_state
from ..models import ContrastHead
from ..models.classifier_input import classifier_input
from ..ops import forked_rng


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind a wrapper for several GPUs.

    Args:
        model (nn.Module): Any model.
    """
    return model.module if is_model_wrapper(model) else model


def student_of(model: nn.Module) -> nn.Module:
    """The segmentor that is trained: a UDASegmentor's student, or itself.

    Args:
        model (nn.Module): Any model, wrapped or not.
    """
    model = unwrapped(model)
    return getattr(model, 'segmentor', model)


def chosen_heads(model: nn.Module, names: Sequence[str] | None,
                 where: str) -> dict[str, ContrastHead]:
    """ContrastHeads of a model by mmseg's names, 'aux' or 'aux_0', 'aux_1'.

    Args:
        model (nn.Module): Any model, wrapped or not.
        names (Sequence[str], optional): Which; None: all.
        where (str): Who asks, for the message.

    Returns:
        dict[str, ContrastHead]: At least one.

    Raises:
        ValueError: If there is none, or not one of a name.
    """
    found = contrast_heads(student_of(model))
    if not found:
        raise ValueError(
            f'{where} finds no ContrastHead in auxiliary_head of '
            f'{type(student_of(model)).__name__}; add one or remove {where}.')
    for name in found if names is None else names:
        if name not in found:
            raise ValueError(
                f'{where}: {name!r} is no ContrastHead of the model, which '
                f'has {sorted(found)}.')
    return {name: head for name, head in found.items()
            if names is None or name in names}


def bank_centres(head: ContrastHead) -> tuple[Tensor, Tensor] | None:
    """Mean key of each class, and which classes have one.

    Args:
        head (ContrastHead): The head.

    Returns:
        tuple, optional: float ``(C, D)``, of length 1 where the head's
        embeddings are, and bool ``(C,)``; None for a bank without memory.
    """
    if isinstance(head.bank, BatchBank):
        return None
    centres, exists = head.bank.centres()
    centres = centres.detach().float()
    if head.normalize:
        centres = nn.functional.normalize(centres, dim=1)
    return centres, exists


@contextmanager
def untouched(model: nn.Module, *keys: int | str) -> Iterator[None]:
    """Evaluation mode without gradients; all is as it was afterwards.

    No batch-norm statistics are recorded, and what is drawn inside changes
    no random state outside. Not by ``model.train``, since some models do
    more than to set the mode there.

    Args:
        model (nn.Module): What is looked at.
        *keys: Position of the draws inside, see
            :func:`mmseg_contrast.ops.position_seed`.
    """
    modes = [(part, part.training) for part in model.modules()]
    device = next(model.parameters()).device
    with guarded_random_state(), forked_rng(device, *keys), torch.no_grad():
        for part, _ in modes:
            part.training = False
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode


@dataclass
class Glance:
    """One pass of a segmentor over a batch.

    Args:
        features (Sequence[Tensor]): What its heads get.
        decoder (Tensor, optional): What its decode head classifies; None if
            not asked for or not seen.
        logits (Tensor, optional): What comes out of the classifier.
        probabilities (Tensor, optional): Of the classes, at the images'
            resolution, ``(N, C, H, W)``.
    """

    features: Sequence[Tensor]
    decoder: Tensor | None = None
    logits: Tensor | None = None
    probabilities: Tensor | None = None

    def embed(self, head: ContrastHead) -> Tensor:
        """Embeddings by a head, ``(N, D, h, w)``.

        Args:
            head (ContrastHead): Of the segmentor that was looked at.

        Raises:
            ValueError: If the head asks for what the decode head has not.
        """
        if head.features == 'backbone':
            return head.project(self.features)
        one = self.decoder if head.features == 'decoder' else self.logits
        if one is None:
            raise ValueError(
                f'auxiliary_head.features = {head.features!r}: the decode '
                "head doesn't end with mmseg's cls_seg, so this cannot be "
                "seen; use features = 'backbone'.")
        return head.project([one])


def glance(segmentor: nn.Module, images: Tensor, decode: bool) -> Glance:
    """Run a segmentor; inside :func:`untouched`.

    Args:
        segmentor (EncoderDecoder): The segmentor, not wrapped.
        images (Tensor): Normalised, ``(N, 3, H, W)``.
        decode (bool): Whether the decode head runs too.

    Returns:
        Glance: What was seen.
    """
    features = segmentor.extract_feat(images)
    if not decode:
        return Glance(features)
    with classifier_input(segmentor.decode_head) as seen:
        probabilities = class_probabilities(segmentor, images, features)
    return Glance(features, seen.features, seen.logits, probabilities)
