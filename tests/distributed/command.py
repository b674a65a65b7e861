"""One process of the command line: torchrun command.py train ..., which leaves nothing open."""

import sys

import torch.distributed as dist

from depthmix.cli import main

status = main(sys.argv[1:])
assert not dist.is_initialized(), "a process group that outlives its use can abort the process"
sys.exit(status)
