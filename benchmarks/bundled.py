"""Makes what the project brings for its bundled model anew: `python -m benchmarks.bundled FILE`.

The model writes 40,000 tokens of text, and the statistics of that text are found in the projections that `auto` and
`memit` ask for at block 3. Replace `pipeline/editing/smollm2.safetensors` by the file when the bundled model,
the openings of its text, or the blocks of an edit change.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load

from benchmarks.bench import run
from pipeline import EditOptions, load_model
from pipeline.editing import bundled
from pipeline.editing.editor import METHODS
from pipeline.editing.ordinary_text import OPENINGS, own_text
from pipeline.editing.statistics import give_moments
from pipeline.running.trainer import Runtime, hush

GOLDEN = 3


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="is written")
    parser.add_argument("--model", default="smollm2", help="as for run.py (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=GOLDEN, help="the golden layer (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=EditOptions().statistics.tokens)
    asked = parser.parse_args(words)
    hush(False)
    llm, options = load_model(asked.model), EditOptions(layers=[asked.layer])
    options.statistics.tokens = asked.tokens
    made = llm.fingerprint, asked.tokens
    with tempfile.TemporaryDirectory() as folder:
        before, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", ""), folder
        shipped, bundled.FILE = bundled.FILE, asked.file
        try:
            texts = own_text(llm, asked.tokens, Runtime())
            each = len(texts) // len(OPENINGS)
            texts = [texts[opening * each + turn] for turn in range(each) for opening in range(len(OPENINGS))]
            bundled.write_bundled(asked.file, *made, texts, {})
            for name in ("auto", "memit"):
                method = METHODS[name].make(llm, [asked.layer], options.by(name))
                give_moments(method, llm, options.statistics, Runtime())
            moments = {}
            for file in Path(folder, "golden-layers").glob("moment-*"):
                _, _, content = file.read_bytes().partition(b"\n")
                moments[file.stem.removeprefix("moment-")] = load(content)["moment"]
            bundled.write_bundled(asked.file, *made, texts, moments)
            for key, moment_II in moments.items():
                kept_II = bundled.bundled_moment(key)
                assert kept_II is not None
                off = (kept_II - moment_II).norm() / moment_II.norm()
                print(f"{key}: {len(moment_II)} wide, kept within {off:.1e}")
            print(f"{len(moments)} statistics, {asked.file.stat().st_size / 1e6:.1f} MB in {asked.file}")
        finally:
            bundled.FILE, os.environ["XDG_CACHE_HOME"] = shipped, before


if __name__ == "__main__":
    run(main)
