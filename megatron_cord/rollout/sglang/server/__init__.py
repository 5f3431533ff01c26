"""SGLang servers as child processes: start, health, end, and starting them again."""
