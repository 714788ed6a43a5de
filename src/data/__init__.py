"""Text to packed, memory-mapped token rows."""
