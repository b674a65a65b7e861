"""What each layer of a model knows of a task, before tuning: how many to tune, how many to mix."""
