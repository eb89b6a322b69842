"""What judges the exercises, one module for each notebook: kept apart, so that a notebook does not give answers away."""
