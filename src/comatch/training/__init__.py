"""Both stages of training, on Accelerate."""
