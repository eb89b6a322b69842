"""Figures and pictures of the prefix cache."""
