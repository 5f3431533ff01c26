"""What every process needs, whatever it does: one line for an error, exit statuses, lines on the terminal."""
