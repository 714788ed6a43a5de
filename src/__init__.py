"""Llamita: makes small Llamas out of large ones."""
