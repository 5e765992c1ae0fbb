"""Texts from a trained model: templates with holes, drawing, and showing how texts come about."""
