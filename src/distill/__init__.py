"""Logit distillation: losses, teachers, training loop."""
