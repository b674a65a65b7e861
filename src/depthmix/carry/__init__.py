"""How others carry it: PEFT's wrapper, the Trainer's callback, checkpoints."""
