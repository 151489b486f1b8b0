"""Pretraining of TransXSSM (arXiv:2506.09507) and its baselines on Megatron-Core."""

__version__ = "0.1.0"
