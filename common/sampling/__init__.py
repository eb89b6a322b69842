"""What is done with logits besides choosing a token: options, structure, and how likely a prompt is."""
