"""Several GPUs, with one backward or several in an iteration."""

from __future__ import annotations

from typing import Any

from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adaptation import UDASegmentor


@MODEL_WRAPPERS.register_module()
class UDADistributedDataParallel(MMDistributedDataParallel):
    """As mmengine's, and for ``model.backward = 'sequential'`` too.

    The stock wrapper reduces gradients in the one backward that follows its
    forward. With several, the model's own step runs instead: outside the
    wrapper's forward gradients stay local, and the step averages them once,
    before the update.

    Args:
        module (nn.Module): The model.
        broadcast_buffers (bool): As of the stock wrapper, but not by default:
            mmengine's runner sets it so if no wrapper is named.
        find_unused_parameters (bool): As of the stock wrapper.
        **kwargs: Further arguments of the stock wrapper.
    """

    def __init__(self, module: nn.Module, broadcast_buffers: bool = False,
                 find_unused_parameters: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(
            module=module, broadcast_buffers=broadcast_buffers,
            find_unused_parameters=find_unused_parameters, **kwargs)

    def train_step(self, data: dict,
                   optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One iteration; see :meth:`.UDASegmentor.train_step`.

        Args:
            data (dict): A batch of the loader.
            optim_wrapper (OptimWrapper): The optimizer.

        Returns:
            dict[str, Tensor]: What is logged.
        """
        if getattr(self.module, 'backward_mode', 'sum') == 'sum':
            return super().train_step(data, optim_wrapper)
        return self.module.train_step(data, optim_wrapper)


def refuse_other_wrappers(model: nn.Module) -> None:
    """A UDASegmentor works in DDP, and in no other wrapper.

    A teacher is averaged from whole weights of the student, in the model's
    own forward. Where a wrapper shards them (FSDP, DeepSpeed's ZeRO-3,
    ColossalAI), what is written there is thrown away with the gathered copy.
    DataParallel copies the model in each iteration, and
    MMSeparateDistributedDataParallel wraps the parts, whose gradients nobody
    would reduce.

    Args:
        model (nn.Module): The runner's.

    Raises:
        ValueError: If the model is in such a wrapper.
    """
    if isinstance(model, DistributedDataParallel) or (
            not is_model_wrapper(model)):
        return
    if isinstance(getattr(model, 'module', None), UDASegmentor):
        raise ValueError(
            f'UDASegmentor does not train in {type(model).__name__}, where '
            'teachers would not follow the student: leave model_wrapper_cfg '
            'and strategy out (DDP), or name UDADistributedDataParallel.')
