"""What training and decoding will take, from a model's configuration alone."""
