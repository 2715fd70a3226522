"""Runs the commands of a file in turn, as one of the processes of torchrun, until one fails."""

import json
import sys
from pathlib import Path

from pipeline.cli import main

for words in json.loads(Path(sys.argv[1]).read_text()):
    if code := main(words):
        sys.exit(code)
