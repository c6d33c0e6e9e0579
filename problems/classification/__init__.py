"""Image classification with tuned dropout, decay and augmentation."""
