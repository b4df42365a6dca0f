"""What the tests share: a tiny student, batches, the registry's scope."""

import gc
import os
import runpy
import signal
import sys

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope
from mmengine.visualization import Visualizer
from mmseg.visualization import SegLocalVisualizer

import mmseg_contrast  # noqa: F401
from helpers import unformatted_configs
from mmseg_contrast.environment import allow_checkpoint_classes

os.environ.setdefault('OMP_NUM_THREADS', '1')
torch.set_num_threads(1)
unformatted_configs()


def pytest_collection_finish():
    """What is imported stays: garbage need not be looked for among it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _mmseg_scope():
    init_default_scope('mmseg')
    # mmengine's own loading takes what it adds off torch's list again.
    allow_checkpoint_classes()


@pytest.fixture
def run_tool(tmp_path, monkeypatch):
    """Run a tool in this process: a new one imports for four seconds.

    The tool's arguments follow its path; it runs in ``tmp_path``.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(sys, 'path', list(sys.path))

    before = {one: signal.getsignal(one)
              for one in (signal.SIGINT, signal.SIGTERM)}

    def forget():
        # A tool may take signals for the rest of its process.
        for one, handler in before.items():
            signal.signal(one, handler)
        # mmengine keeps these by name; a real second run is a new process.
        for kind in (MessageHub, MMLogger, Visualizer, SegLocalVisualizer):
            kind._instance_dict.clear()

    def run(tool, *arguments):
        forget()
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
        runpy.run_path(str(tool), run_name='__main__')

    yield run
    forget()
    torch.set_num_threads(1)
