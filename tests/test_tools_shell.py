import os
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
SCRIPTS = ('dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh')


def run_script(tmp_path, script, *arguments, **variables):
    """Run it with a fake python and srun; what they were called with."""
    fakes = tmp_path / 'fakes'
    fakes.mkdir()
    for name in ('python', 'srun'):
        fake = fakes / name
        fake.write_text('#!/bin/sh\n'
                        f'echo {name} > "$RECORD"\n'
                        'for word; do echo "$word"; done >> "$RECORD"\n')
        fake.chmod(0o755)
    # From a folder of its own, under a path with spaces.
    tools = tmp_path / 'a clone' / 'tools'
    tools.mkdir(parents=True)
    (tools / script).write_bytes((TOOLS / script).read_bytes())
    record = tmp_path / 'record'
    env = {
        'PATH': f'{fakes}:{os.environ["PATH"]}',
        'RECORD': str(record),
        **variables
    }
    done = subprocess.run(['bash', str(tools / script), *arguments],
                          env=env,
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    words = record.read_text().splitlines() if record.exists() else []
    return done, words, str(tools)


@pytest.mark.parametrize('script', SCRIPTS)
def test_syntax_and_mode(script):
    subprocess.run(['bash', '-n', str(TOOLS / script)], check=True)
    assert os.access(TOOLS / script, os.X_OK)


def test_dist_train_on_one_machine(tmp_path):
    done, words, tools = run_script(tmp_path, 'dist_train.sh', 'my config.py',
                                    '4', '--cfg-options', 'a=[1, 2]')
    assert done.returncode == 0, done.stderr
    assert words == [
        'python', '-m', 'torch.distributed.run', '--nnodes=1',
        '--node_rank=0', '--master_addr=127.0.0.1', '--nproc_per_node=4',
        '--master_port=29500', f'{tools}/train.py', 'my config.py',
        '--launcher', 'pytorch', '--cfg-options', 'a=[1, 2]'
    ]


def test_dist_test_on_the_second_of_two_machines(tmp_path):
    done, words, tools = run_script(
        tmp_path, 'dist_test.sh', 'c.py', 'last one.pth', '8', '--tta',
        NNODES='2', NODE_RANK='1', PORT='1234', MASTER_ADDR='node0')
    assert done.returncode == 0, done.stderr
    assert words == [
        'python', '-m', 'torch.distributed.run', '--nnodes=2',
        '--node_rank=1', '--master_addr=node0', '--nproc_per_node=8',
        '--master_port=1234', f'{tools}/test.py', 'c.py', 'last one.pth',
        '--launcher', 'pytorch', '--tta'
    ]


def test_slurm_train(tmp_path):
    done, words, tools = run_script(
        tmp_path, 'slurm_train.sh', 'gpu', 'my job', 'c.py', '--resume',
        GPUS='16', GPUS_PER_NODE='8', CPUS_PER_TASK='3',
        SRUN_ARGS='--qos=high --exclude=*')
    assert done.returncode == 0, done.stderr
    assert words == [
        'srun', '-p', 'gpu', '--job-name=my job', '--gres=gpu:8',
        '--ntasks=16', '--ntasks-per-node=8', '--cpus-per-task=3',
        '--kill-on-bad-exit=1', '--qos=high', '--exclude=*', 'python', '-u',
        f'{tools}/train.py', 'c.py', '--launcher=slurm', '--resume'
    ]


def test_slurm_test_with_the_defaults(tmp_path):
    done, words, tools = run_script(tmp_path, 'slurm_test.sh', 'gpu', 'job',
                                    'c.py', 'x.pth', '--out', 'my out')
    assert done.returncode == 0, done.stderr
    assert words == [
        'srun', '-p', 'gpu', '--job-name=job', '--gres=gpu:4', '--ntasks=4',
        '--ntasks-per-node=4', '--cpus-per-task=5', '--kill-on-bad-exit=1',
        'python', '-u', f'{tools}/test.py', 'c.py', 'x.pth',
        '--launcher=slurm', '--out', 'my out'
    ]


@pytest.mark.parametrize('script', SCRIPTS)
def test_missing_arguments_print_the_usage(tmp_path, script):
    done, words, _ = run_script(tmp_path, script, 'only one')
    assert done.returncode == 2
    assert 'usage:' in done.stderr
    assert words == []
