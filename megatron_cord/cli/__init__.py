"""The command line ``cord``: one module a command; what a command does is imported when it runs."""
