"""Texts from a trained model: templates with holes, sampling, and views of how samples come about."""
