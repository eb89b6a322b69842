"""Quantising a model to a folder, and writing it. Product, not lesson: the algorithm is in the stage's root."""
