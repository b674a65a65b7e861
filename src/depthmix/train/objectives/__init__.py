"""What a model is trained on: answers, pairs of answers, or rewards (`--objective`)."""
