"""`python -m extraopt --version`: which extraopt, torch and triton a bug report is about."""

import argparse
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__


def main() -> None:
    """Print the versions."""
    parser = argparse.ArgumentParser(prog="python -m extraopt", description=__doc__)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    versions = f"extraopt {__version__} (torch {torch.__version__}, triton {triton})"
    parser.add_argument("--version", action="version", version=versions)
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
