"""Runs the commands of a file in turn, as one of several processes, until one fails."""

import json
import sys
from pathlib import Path

from pipeline.cli import main
from pipeline.evaluation import plan

plan.FLUENCY_TOKENS = 4  # as all tests have it

for words in json.loads(Path(sys.argv[1]).read_text()):
    if code := main(words):
        sys.exit(code)
