"""Image classification with tuned dropout, weight decay and augmentation."""
