"""What judges the exercises, a module for each notebook: kept apart, so that a notebook gives no answers away."""
