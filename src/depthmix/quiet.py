"""Notices of other packages that are not for the reader of a command's output."""

import logging

# It warns, wherever PEFT imports it, of a kernel that nobody has asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
