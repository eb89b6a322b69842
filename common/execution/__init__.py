"""How a step is executed on the machine at hand: an axis of its own, next to the stages."""
