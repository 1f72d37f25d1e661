"""A target: what is known of it, and how its hidden states are read."""
