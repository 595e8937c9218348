"""The `scmmgpt` command."""

import argparse
import sys


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scmmgpt", description="One language model for single cells and text.")
    parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
