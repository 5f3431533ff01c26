"""What runs in the interpreter of a server; imports nothing of the project."""
