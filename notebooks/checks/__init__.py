"""The checks of the exercises, a module for each notebook, kept apart so that a notebook shows no answers."""
