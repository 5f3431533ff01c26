"""What a step returns: its measurements and seconds, and the results of each token and layer."""
