"""What holds for any record: it becomes a request or is named; and a request is written and read unchanged."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import UserError
from pipeline.requests.layouts import LAYOUTS
from pipeline.requests.readers import load_requests, read_requests, write_requests
from pipeline.requests.schema import EditRequest, Probe

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

letters = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t\"',;{}[]\\")
texts = st.text(letters, min_size=1, max_size=12).filter(lambda text: text.strip())
probes = st.builds(Probe, prompt=texts, answer=texts, axis=st.none() | texts)
lists = st.lists(probes, max_size=2).map(tuple)
requests = st.builds(
    EditRequest,
    id=texts,
    prompt=texts,
    subject=st.none() | texts,
    new_answer=texts,
    old_answer=st.none() | texts,
    rephrases=st.lists(texts, max_size=2).map(tuple),
    locality=lists,
    portability=lists,
    source=st.none() | texts,
)
FIELDS = sorted(
    {field for layout in LAYOUTS for field in layout.fields}
    | {
        "id",
        "case_id",
        "locality",
        "locality_prompt",
        "subject",
        "ground_truth",
        "rephrase",
        "rephrase_prompt",
        "locality_ground_truth",
        "portability",
    }
    | {"answers", "loc", "loc_ans", "paraphrase_prompts", "neighborhood_prompts", "rephrases", "source"}
    | {"en", "zh", "personas", "mhop", "mhop_ans", "sub_question", "sub_answer", "Forgetfulness", "target_old"}
)
INNER = ["prompt", "ground_truth", "answer", "axis", "str", "target_new", "subject", "src", "alt", "loc"]
INNER += ["original_fact", "test_queries", "answers", "value", "New Question", "New Answer"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(INNER),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def scratch(tmp_path_factory: Any, content: bytes, name: str = "file.json") -> Path:
    file: Path = tmp_path_factory.getbasetemp() / name
    file.write_bytes(content)
    return file


@FEW
@given(st.lists(requests, min_size=1, max_size=4, unique_by=lambda request: request.id), st.booleans())
def test_requests_are_read_as_they_were_written(
    tmp_path_factory: Any, batch: list[EditRequest], packed: bool
) -> None:
    name = "file.jsonl.gz" if packed else "file.jsonl"
    file = write_requests(tmp_path_factory.getbasetemp() / name, batch)
    assert load_requests(file) == batch
    lines = (gzip.decompress if packed else bytes)(file.read_bytes()).split(b"\n")[:-1]
    assert load_requests(scratch(tmp_path_factory, b"[" + b",\n".join(lines) + b"]")) == batch


@FEW
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=8))
def test_any_record_is_a_request_or_is_named(tmp_path_factory: Any, record: dict[str, Any]) -> None:
    _is_read_or_named(tmp_path_factory, record)


@FEW
@given(st.sampled_from(LAYOUTS), st.data())
def test_any_record_of_a_layout_is_a_request_or_is_named(tmp_path_factory: Any, layout: Any, data: Any) -> None:
    needed = {field: data.draw(anything) for field in sorted(layout.fields)}
    more = data.draw(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
    _is_read_or_named(tmp_path_factory, more | needed)


@FEW
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=8), st.data())
def test_any_record_is_read_by_any_mapping_or_is_named(tmp_path_factory: Any, record: Any, data: Any) -> None:
    path = st.lists(st.sampled_from([*FIELDS, *INNER, "0"]), min_size=1, max_size=3).map(".".join)
    fields = data.draw(st.dictionaries(st.sampled_from(["subject", "rephrases", "source"]), path))
    fields |= {name: data.draw(path) for name in ("prompt", "new_answer", "locality.prompt", "locality.answer")}
    _is_read_or_named(tmp_path_factory, record, fields)


def _is_read_or_named(tmp_path_factory: Any, record: dict[str, Any], fields: dict[str, str] | None = None) -> None:
    file = scratch(tmp_path_factory, json.dumps([record]).encode())
    (reading,) = read_requests(file, fields=fields)
    if isinstance(reading.requests, UserError):
        assert str(reading.requests).startswith((f"{file}: record 0: ", f"{file}: record 0, "))
    else:
        assert reading.requests and reading.layout
        assert all(request.prompt.strip() and request.new_answer.strip() for request in reading.requests)


@FEW
@given(st.binary(max_size=60), st.sampled_from(["file.json", "file.csv"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, content: bytes, name: str) -> None:
    """Never another error than the user's own, whatever stands in a file."""
    file = scratch(tmp_path_factory, content, name)
    try:
        load_requests(file)
    except ValueError as error:
        assert type(error).__module__.startswith("pipeline."), error
        assert str(file) in str(error)


@FEW
@given(
    st.lists(
        st.fixed_dictionaries(dict.fromkeys(("prompt", "new_answer", "rephrase", "subject"), texts)), min_size=1
    ),
    st.sampled_from(",;\t"),
)
def test_any_table_is_read_as_it_was_written(
    tmp_path_factory: Any, rows: list[dict[str, str]], delimiter: str
) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
    table.writeheader()
    table.writerows(rows)
    read = load_requests(scratch(tmp_path_factory, text.getvalue().encode(), "file.csv"))
    assert [(r.prompt, r.new_answer, r.rephrases[0], r.subject) for r in read] == [
        tuple(row[name].strip() for name in ("prompt", "new_answer", "rephrase", "subject")) for row in rows
    ]
