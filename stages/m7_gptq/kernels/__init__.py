"""What multiplies by a weight that stays in 4 bits."""
