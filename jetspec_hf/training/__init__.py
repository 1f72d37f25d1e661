"""Training: data, losses, the trainer, evaluation, and the commands for them."""

from .trainer import JetSpecTrainer, JetSpecTrainingArguments

__all__ = ["JetSpecTrainer", "JetSpecTrainingArguments"]
