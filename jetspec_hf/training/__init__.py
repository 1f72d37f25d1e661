"""Training: data, losses, the trainer, evaluation, and the commands for them."""
