"""The sub-commands of `depthmix`, one file each.

A command is a module here with `run(argv) -> int`. Its name and summary stand in
`depthmix.cli.COMMANDS`; nothing else knows of it.
"""
