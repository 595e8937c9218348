"""Readers of user files: cells in all supported formats (`cell_files.read_file`) and lists of labels."""
