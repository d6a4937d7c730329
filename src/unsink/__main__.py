"""`python -m unsink` is `unsink`. It is all that runs before the command line is loaded, and no traceback ends it."""

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from unsink.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(3)  # as `errors.Interrupted`


if __name__ == "__main__":
    main()
