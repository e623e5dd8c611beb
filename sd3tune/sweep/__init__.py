"""Sweeps: many trainings of one configuration, with the values of some keys chosen by Optuna. It imports no torch."""
