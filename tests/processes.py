"""Functions in other processes, without a new import of everything.

Processes are forked from a server that has imported the slow packages and
done nothing else: one starts in a tenth of a second, with a clean state.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback

import torch
from mmengine.registry import init_default_scope

from helpers import unformatted_configs

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload([
    'torch', 'mmengine.runner', 'mmseg.apis', 'mmseg_contrast'])


def _run(rank, world, folder, function, arguments):
    torch.set_num_threads(1)
    init_default_scope('mmseg')
    unformatted_configs()
    try:
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                              WORLD_SIZE=str(world))
            torch.distributed.init_process_group(
                'gloo', init_method=f'file://{folder}/store', rank=rank,
                world_size=world)
        function(folder, *arguments)
        if world > 1:
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f'error{rank}.txt').write_text(traceback.format_exc())
        raise


def on_ranks(function, folder, *arguments, ranks=2, timeout=200):
    """Call ``function(folder, *arguments)`` on each rank of a gloo group.

    The function must be one of a module, and leave its results as files in
    the folder. Fails with the traceback of the first rank that fails, or
    with the ranks that have not ended after ``timeout`` seconds. One rank is
    another process, without a group.
    """
    processes = [
        _context.Process(target=_run, args=(
            rank, ranks, folder, function, arguments))
        for rank in range(ranks)]
    end = time.monotonic() + timeout
    codes = [None] * ranks
    for process in processes:
        process.start()
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.02)
        codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob('error*.txt'))]
    assert codes == [0] * ranks, '\n'.join(errors) or codes
