"""Run directories as one offline page, pictures and a terminal table."""
