"""Functions on several ranks, without a new import of everything.

Processes are forked from a server that has imported the slow packages and
done nothing else: a rank starts in a tenth of a second, with a clean state.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback

import torch
from mmengine.registry import init_default_scope

from helpers import unformatted_configs

SLOW = ['torch', 'mmengine.runner', 'mmseg.apis', 'mmseg_contrast']
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(SLOW)


def _rank(rank, world, folder, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(world), OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    init_default_scope('mmseg')
    unformatted_configs()
    try:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=rank,
            world_size=world)
        function(folder, *arguments)
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f'error{rank}.txt').write_text(traceback.format_exc())
        raise


def on_ranks(function, folder, *arguments, ranks=2, timeout=200):
    """Call ``function(folder, *arguments)`` on each rank of a gloo group.

    The function must be one of a module, and leave its results as files in
    the folder. Fails with the traceback of the first rank that fails, or
    with the ranks that have not ended after ``timeout`` seconds.
    """
    processes = [
        _context.Process(target=_rank, args=(
            rank, ranks, folder, function, arguments))
        for rank in range(ranks)]
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        while time.monotonic() < end:
            codes = [process.exitcode for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob('error*.txt'))]
    assert codes == [0] * ranks, '\n'.join(errors) or codes
