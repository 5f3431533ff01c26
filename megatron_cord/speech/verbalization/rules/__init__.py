"""The rules by which plain text is read, a file for each kind."""
