"""What runs in a server's interpreter, which lacks the project's packages: nothing here imports the project."""
