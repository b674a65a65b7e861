"""Using a tuned model: asked as in training, stopping where training ended its rows."""
