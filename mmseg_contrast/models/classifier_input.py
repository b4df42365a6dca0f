"""What a decode head classifies, taken from any head of mmseg."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Seen:
    """What went through a head's classifier.

    Args:
        features (Tensor, optional): Its input before dropout,
            ``(N, D, h, w)``; None while the classifier has not run.
        logits (Tensor, optional): Its output, ``(N, C, h, w)``.
    """

    features: Tensor | None = None
    logits: Tensor | None = None


@contextmanager
def classifier_input(head: nn.Module) -> Iterator[Seen]:
    """See what a head classifies while it runs inside the block.

    Heads of mmseg end with ``cls_seg``: dropout, then the convolution
    ``conv_seg``. Of several such calls the last counts. Of an HRDAHead it is
    the features of the context, and the fused logits.

    Args:
        head (nn.Module): A decode head, or a list of them (a cascade), of
            which the last is meant.

    Yields:
        Seen: Filled as the head runs; empty for heads that don't end so.
    """
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    seen = Seen()
    watchers = getattr(head, 'watchers', None)
    if isinstance(watchers, list):  # a head that says it itself
        watchers.append(seen)
        try:
            yield seen
        finally:
            watchers[:] = [one for one in watchers if one is not seen]
        return
    classifier = getattr(head, 'conv_seg', None)
    if not isinstance(classifier, nn.Module):
        yield seen
        return
    dropout = getattr(head, 'dropout', None)
    start = dropout if isinstance(dropout, nn.Module) else classifier

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.features = inputs[0]

    def after(module: nn.Module, inputs: tuple[Tensor, ...],
              output: Tensor) -> None:
        seen.logits = output

    handles = [start.register_forward_pre_hook(before),
               classifier.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
