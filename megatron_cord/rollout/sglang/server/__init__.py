"""SGLang servers as child processes: start, health, end."""
