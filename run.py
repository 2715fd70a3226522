"""Start a command of the pipeline: `python run.py`, `python run.py attribute --help`."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
