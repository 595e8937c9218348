"""What every command line shares: errors of one line, checks before the work, whole files, and progress."""
