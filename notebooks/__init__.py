"""The walkthroughs: one notebook a stage, an overview and a comparison. `python -m notebooks` executes them."""
