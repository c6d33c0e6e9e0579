"""Dataset distillation: learned training images."""
