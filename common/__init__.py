"""Command lines and files; knows nothing of the project."""
