"""Export: a folder that transformers loads without depthmix."""
