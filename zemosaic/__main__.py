"""``python -m zemosaic``: the command line."""

from zemosaic.cli import main

if __name__ == "__main__":
    main()
