"""One iteration with a backward for each group of objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmengine.dist import all_reduce_params
from mmengine.optim import OptimWrapper
from torch import Tensor

if TYPE_CHECKING:
    from .segmentor import UDASegmentor

#: When losses are backpropagated.
MODES = ('sum', 'sequential')
#: Gradients of so many MiB are sent at a time, through a copy of that size.
BUCKET_MB = 64


def sequential_train_step(model: UDASegmentor, data: dict,
                          optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
    """A training step that backpropagates groups one after the other.

    Objectives of a group share passes of the student; those of different
    groups share none, so the sum of their gradients is the gradient of the
    sum. The backward of a group frees what its passes have kept, before the
    passes of the next group begin.

    Loss scaling, clipping and accumulation are those of the optimizer
    wrapper, for which it remains one iteration. On several GPUs gradients are
    averaged once, before the update.

    Args:
        model (UDASegmentor): The model itself, in no wrapper.
        data (dict): A batch of the loader.
        optim_wrapper (OptimWrapper): The optimizer.

    Returns:
        dict[str, Tensor]: What is logged, with the sum as ``loss``.
    """
    with optim_wrapper.optim_context(model):
        step = model.begin(**model.data_preprocessor(data, training=True))
    losses: dict[str, Tensor] = {}
    iteration = optim_wrapper._inner_count
    for names in model.groups:
        with optim_wrapper.optim_context(model):
            some = model.evaluate(step, names)
        loss, _ = model.parse_losses(some)
        # A wrapper counts its backwards, and accumulates by that count.
        optim_wrapper._inner_count = iteration
        optim_wrapper.backward(optim_wrapper.scale_loss(loss))
        losses.update({key: value.detach() for key, value in some.items()})
        del loss, some  # the graph, before the next one grows
    with optim_wrapper.optim_context(model):
        logs = model.finish(step)
    if optim_wrapper.should_update():
        # The same on all ranks: a loss without pixels is a connected zero.
        all_reduce_params(
            [one.grad for group in optim_wrapper.optimizer.param_groups
             for one in group['params'] if one.grad is not None],
            bucket_size_mb=BUCKET_MB, op='mean')
        optim_wrapper.step()
        optim_wrapper.zero_grad()
    return model.parse_losses({**losses, **logs})[1]
