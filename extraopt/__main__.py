"""The `extraopt` command. `--version` and `env`, what a bug report needs, do without the command line's libraries."""

import sys


def main() -> None:
    """Print the versions, or run the command line, whose libraries the core does without."""
    if sys.argv[1:] == ["--version"]:
        print_versions()
        return
    if sys.argv[1:] == ["env"]:
        from .tools.environment import print_environment

        print_environment()
        return
    try:
        from .tools.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"extraopt: the command line needs {error.name}: pip install 'extraopt[cli]'")
    run()


def print_versions() -> None:
    """One line."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from . import __version__

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    print(f"extraopt {__version__} (torch {torch.__version__}, triton {triton})")


if __name__ == "__main__":
    main()
