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


# torch.compile takes hooks as they are when it first runs, so these are set
# once and ask a flag of the module. They are functions of the module that
# they get: a copy of it (a teacher's) keeps what it sees to itself.


def _keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if module.watched:
        module.seen_input = inputs[0]


def _keep_output(module: nn.Module, inputs: tuple[Tensor, ...],
                 output: Tensor) -> None:
    if module.watched:
        module.seen_output = output


def prepare_to_see(head: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Set the hooks of :func:`classifier_input`, if they are not there yet.

    Args:
        head (nn.Module): A decode head, or a list of them.

    Returns:
        tuple, optional: Where the input and where the output is seen; None
            for a head that doesn't end with mmseg's ``cls_seg``.
    """
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    classifier = getattr(head, 'conv_seg', None)
    if not isinstance(classifier, nn.Module):
        return None
    dropout = getattr(head, 'dropout', None)
    start = dropout if isinstance(dropout, nn.Module) else classifier
    if not hasattr(classifier, 'watched'):
        start.watched = classifier.watched = False
        start.register_forward_pre_hook(_keep_input)
        classifier.register_forward_hook(_keep_output)
    return start, classifier


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
        Seen: Filled at the end of the block; empty for heads that don't end
            so.
    """
    seen = Seen()
    watchers = getattr(head, 'watchers', None)
    if isinstance(watchers, list):  # a head that says it itself
        watchers.append(seen)
        try:
            yield seen
        finally:
            watchers[:] = [one for one in watchers if one is not seen]
        return
    parts = prepare_to_see(head)
    if parts is None:
        yield seen
        return
    start, classifier = parts
    start.watched = classifier.watched = True
    try:
        yield seen
    finally:
        start.watched = classifier.watched = False
        # Not kept any longer: the graph would stay with them.
        seen.features = start.__dict__.pop('seen_input', None)
        seen.logits = classifier.__dict__.pop('seen_output', None)
