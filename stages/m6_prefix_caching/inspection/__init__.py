"""Figures, pictures and checks of the prefix cache."""
