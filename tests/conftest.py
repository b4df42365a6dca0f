"""What the tests share: a tiny student, batches, the registry's scope."""

import os

import pytest
import torch
from mmengine.registry import init_default_scope

import mmseg_contrast  # noqa: F401
from mmseg_contrast.environment import allow_checkpoint_classes

os.environ.setdefault('OMP_NUM_THREADS', '1')
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _mmseg_scope():
    init_default_scope('mmseg')
    # mmengine's own loading takes what it adds off torch's list again.
    allow_checkpoint_classes()
