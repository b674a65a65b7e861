"""One process of the command line: torchrun command.py train ..."""

import sys

from launching import leave

from depthmix.cli import main

leave(main(sys.argv[1:]))
