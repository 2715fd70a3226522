"""A small file of somebody else's takes no large memory, no long time, no traceback: a line says what is wrong."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from pipeline.attribution.profile import GoldenProfile
from pipeline.errors import UserError
from pipeline.model.loading import load_model
from pipeline.output import check_resumed
from pipeline.parsing import parse
from pipeline.requests.readers import load_requests, read_requests

MEMORY, TIME = 200e6, 20.0  # bytes that Python may hold, and seconds that a refusal may take


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    started = time.monotonic()
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MEMORY * (6 if "list that is a bomb" in request.node.name else 1)  # half a billion characters may
    assert time.monotonic() - started < TIME


RECORD = {"prompt": "The capital of Peru is", "new_answer": "Rome"}
PROBE = {"prompt": "a", "answer": "b"}
WIDE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "wrong rephrases": (lambda: {"rephrases": [0] * 500_000}, "field 'rephrases.0'"),
    "blank rephrases": (lambda: {"rephrases": [""] * 500_000}, "field 'rephrases.0'"),
    "wrong probes": (lambda: {"locality": [{}] * 200_000}, "field 'locality.0.prompt'"),
    "many rephrases": (lambda: {"rephrases": ["x"] * 100_000}, "at most 10000 items"),
    "many probes": (lambda: {"portability": [PROBE] * 50_000}, "at most 10000 items"),
    "unknown fields": (lambda: dict.fromkeys(map(str, range(100_000)), 0), "100002 fields"),
}


@pytest.mark.parametrize(("more", "words"), WIDE.values(), ids=WIDE)
def test_cases_of_wide_records(more: Callable[[], dict[str, Any]], words: str, tmp_path: Path) -> None:
    """The first error of a record ends it; of all of them none is built."""
    file = tmp_path / "wide.jsonl"
    file.write_text(json.dumps(RECORD | more()))
    line = refusal(lambda: load_requests(file))
    assert str(file) in line and any(word in line for word in words.split("|")) and len(line) < 1000


def bomb(of: bytes) -> bytes:
    """A billion bytes, gzipped: a part, again and again."""
    return gzip.compress(of * 10_000_000) * 100


def deep(levels: int) -> str:
    return json.dumps(RECORD | {"portability": 0}).replace("0", "[" * levels + "]" * levels)


LONG: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "blank lines": ("a.jsonl", lambda: b"\n" * 3_000_000, "blank lines in a row"),
    "gzipped blank lines": ("a.jsonl.gz", lambda: bomb(b"\n"), "blank lines in a row"),
    "blank lines of a table": ("a.csv", lambda: b"prompt,new_answer\n" + b"\n" * 3_000_000, "blank lines in a row"),
    "one line": ("a.jsonl.gz", lambda: bomb(b" "), "longer than 16,777,216 characters"),
    "one cell": ("a.csv", lambda: b"prompt,new_answer\n" + b'"' + b"a" * 20_000_000, "longer than"),
    "columns": ("a.csv", lambda: b"a," * 1_000_000 + b"\n", "columns; the most are 10,000"),
    "deep": ("a.jsonl", lambda: deep(20_000).encode(), "nested more than 64 deep"),
    "deep for us alone": ("a.jsonl", lambda: deep(500).encode(), "nested more than 64 deep"),
    "a list that is a bomb": ("a.json.gz", lambda: gzip.compress(b"[") + bomb(b" ") * 2, "a JSON list longer than"),
    "a deep list": ("a.json", lambda: b"[" * 20_000, "nested more than 64 deep"),
    "a long number": ("a.jsonl", lambda: b'{"prompt": ' + b"9" * 100_000 + b"}", "malformed JSON"),
}


@pytest.mark.parametrize(("name", "content", "words"), LONG.values(), ids=LONG)
def test_cases_of_long_and_deep_requests(
    name: str, content: Callable[[], bytes], words: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content())

    def read() -> None:
        for one in read_requests(file):
            if isinstance(one.requests, UserError):
                raise one.requests

    line = refusal(read)
    assert words in line and len(line) < 1000


CONFIGS: dict[str, tuple[bytes, str]] = {
    "deep": (b"edit: " + b"[" * 20_000, "nested more than 64 deep"),
    "deep mapping": (b'{"a": ' * 20_000, "nested more than 64 deep"),
    "bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (b, b, b",".join([b"*%c" % (b - 1)] * 9)) for b in range(98, 106))
        + b"seed: *i\n",
        "does not exist",
    ),
    "a bomb of a flag": (
        b"limit: [" + b",".join([b"&a [x,x]"] + [b"*a"] * 9) + b"]", "limit: expected a whole number",
    ),
    "a date that is none": (b"seed: 2001-99-99", "malformed YAML"),
    "a long number": (b"seed: " + b"9" * 10_000, "malformed YAML"),
    "a tag": (b"seed: !!python/object/apply:os.system [ls]", "malformed YAML"),
    "no text": (b"\xff\xfe\x00", "malformed YAML"),
    "large": (b"#" * 2_000_000, "larger than 1 MB"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), CONFIGS.values(), ids=CONFIGS)
def test_cases_of_hostile_configs(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    line = refusal(lambda: parse("run", ["--config", str(file)]))
    assert str(file) in line and words in line and len(line) < 1500
    (tmp_path / "options.yaml").write_bytes(content)
    assert "resume: " in refusal(lambda: check_resumed(tmp_path, {"seed": 0}))


@pytest.mark.parametrize("value", ["[" * 20_000, "{a: " * 20_000, "2001-99-99", "9" * 10_000])
def test_cases_of_hostile_flags(value: str) -> None:
    line = refusal(lambda: parse("run", ["--limit", value]))
    assert line.startswith("limit: expected a whole number") and len(line) < 500


def profile(**changes: Any) -> dict[str, Any]:
    blocks = [0, 1, 2, 3]
    fields = {
        "model": "m", "fingerprint": "f", "method": "lga", "scope": "mlp", "scores": [0.1] * 4, "fences": None,
        "excluded": [], "ranking": blocks, "raw_ranking": blocks, "golden_layers": [2], "request_set": "demo",
        "requests": 1, "seconds": 1.0,
    }  # fmt: skip
    return fields | changes


PROFILES: dict[str, tuple[Any, str]] = {
    "too few scores": (profile(scores=[0.1]), "block 1 has no score; those of 0 to 0 are there"),
    "no scores": (profile(scores=[]), "has no score"),
    "a golden layer of another model": (profile(golden_layers=[99]), "block 99 has no score"),
    "negative": (profile(golden_layers=[-1]), "block -1 has no score"),
    "no golden layer": (profile(golden_layers=[]), "golden_layers"),
    "too little stability": (
        profile(stability={"resamples": 1, "low": [0.0], "high": [0.0], "chosen": [1.0]}), "stability is not of 4",
    ),
    "a list": ([], "no golden profile"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), PROFILES.values(), ids=PROFILES)
def test_cases_of_hostile_profiles(content: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "golden_profile.json"
    file.write_text(json.dumps(content))
    line = refusal(lambda: GoldenProfile.load(file))
    assert str(file) in line and words in line
    for raw in (b"[" * 20_000, b"\xff\xfe", b"", b'{"scores": ' * 500):
        file.write_bytes(raw)
        assert str(file) in refusal(lambda: GoldenProfile.load(file))


def gguf(*parts: bytes, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(parts)


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


LLAMA = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
GGUFS = {
    "counts": gguf(tensors=2**60, values=2**60),
    "negative counts": gguf(tensors=2**64 - 1, values=2**64 - 1),
    "a long key": gguf(text(b"a", 2**62), values=1),
    "a type that is none": gguf(text(b"a"), struct.pack("<I", 999), values=1),
    "a long list": gguf(text(b"a"), struct.pack("<IIQ", 9, 4, 2**60), values=1),
    "lists in lists": gguf(text(b"a"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 20_000, values=1),
    "no more than a name": gguf(LLAMA, values=1),
    "a tensor outside": gguf(
        LLAMA, text(b"token_embd.weight"), struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 2**40), tensors=1, values=1
    ),
    "tensors without end": gguf(LLAMA, text(b"x"), struct.pack("<I", 2**32 - 1), tensors=1, values=1),
    "no text": gguf(text(b"\xff\xfe"), struct.pack("<I", 8), text(b"\xff"), values=1),
    "other end first": b"GGUF" + struct.pack(">IQQ", 3, 2**60, 2**60),
}


@pytest.mark.parametrize("content", GGUFS.values(), ids=GGUFS)
def test_cases_of_hostile_gguf_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content + bytes(64))
    assert str(file) in refusal(lambda: load_model(str(file)))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    "content", [b"[" * 20_000, b'{"a": ' * 20_000, b"\xff\xfe\x00", b"[]", b"3", b'{"model_type": []}']
)
def test_cases_of_hostile_model_folders(name: str, content: bytes, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / name).write_bytes(content)
    try:
        load_model(str(folder))
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
