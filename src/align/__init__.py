"""Alignment: dialogues, rejection sampling, preferences and rewards; TRL's trainers do the training."""
