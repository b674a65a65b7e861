"""What MoDE is: mixture, router, divergences, fused loss. Tensors in, tensors out."""
