"""train.py under FSDP2 on CPUs, for which accelerate has no switch: it takes only kinds of processes with accelerators for it."""

import os
import sys

import accelerate.state
from accelerate.utils import DistributedType

SETTINGS = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "50000",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
start = accelerate.state.AcceleratorState.__init__


def start_sharded(self, *args, **kwargs):
    if not accelerate.state.AcceleratorState._shared_state:
        accelerate.state.PartialState(cpu=True)
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    start(self, *args, **kwargs)


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    accelerate.state.AcceleratorState.__init__ = start_sharded
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import train
    from effvit_zoo.errors import run_command

    sys.exit(run_command(train.main))
