"""Shared parts of the command lines: errors of one line, checks before the work, whole files, and progress."""
