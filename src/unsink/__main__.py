"""`python -m unsink` is `unsink`."""

from unsink.cli import main

main()
