"""Several processes on CPUs, where `accelerate launch --cpu --num_processes N` by itself starts only one.

Without mpirun, accelerate 1.15 runs the script once, with a rendezvous address in the environment but no ranks
(https://github.com/huggingface/accelerate/issues/2741). Then a run would silently have a batch of the wrong size. What was asked for
stands in the command line of the parent process; torch's own launcher can do it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import parse_flag_from_env

_RANKS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHERS = ("launch", "accelerate-launch", "launch.py", "accelerate.commands.launch")


def start_missing_processes() -> None:
    """Replaces this process by torch's launcher with the number of processes that accelerate was told and did not start.

    Returns only where there is nothing to do.
    """
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_PORT" in os.environ
    if not launched_on_cpu or any(name in os.environ for name in _RANKS):
        return
    processes = _requested_processes()
    if processes > 1:
        port = os.environ["MASTER_PORT"]
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            f"--master_port={port}",
        ]
        os.execv(sys.executable, [*launcher, *sys.argv])


def process_state() -> PartialState:
    """accelerate's view of this process among the others; `Accelerator` would start it alike, `PartialState()` overlooks `--cpu`."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def process_group() -> Iterator[None]:
    """Whatever runs of several processes are trained inside, their connection is closed at the end."""
    try:
        yield
    finally:
        process_state().destroy_process_group()


def _requested_processes() -> int:
    """`num_processes` of the `accelerate launch` that is this process' parent; 1 if there is none."""
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    places = [place for place, word in enumerate(words) if os.path.basename(word) in _LAUNCHERS]
    if not places:
        return 1
    args = launch_command_parser().parse_args(words[places[0] + 1 :])
    if args.num_processes is None and args.config_file is not None:
        return load_config_from_file(args.config_file).num_processes
    return args.num_processes or 1
