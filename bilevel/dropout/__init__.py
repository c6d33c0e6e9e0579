"""Dropout with tuned rates: its kinds, and the rates of any module as hyperparameters."""
