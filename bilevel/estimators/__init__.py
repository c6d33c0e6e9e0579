"""Estimators for scikit-learn, which tune their own hyperparameters in one training."""
