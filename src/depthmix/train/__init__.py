"""Training: parameter groups, the trainer's callback, data and arguments of `depthmix train`."""
