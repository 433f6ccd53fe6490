"""Regularisation of a language model: seven hyperparameters, or millions."""

from bench.paper.lstm.experiment import EXPERIMENT as EXPERIMENT
