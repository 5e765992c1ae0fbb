"""Figures of models and samples, and tables of them."""
