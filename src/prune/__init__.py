"""Structured pruning of dense Llamas: importance, plan, surgery."""
