"""The schemas: generated, complete, and strict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_speq import core, schema
from edge_speq.cli.main import main
from edge_speq.engine.step_records import StepRecord
from edge_speq.schema import generate
from edge_speq.schema.outputs import OUTPUTS, StepOutput

NAMES = list(OUTPUTS)
STATS = core.Stats(
    core.Timing(n_prompt=3, n_generated=2, n_decoded=1, ttft_seconds=0.1, decode_seconds=0.5),
    core.Speculation(steps=2, drafted=4, accepted=3),
    core.ExpertCounters(total=96, slots=48, hits=3, misses=1),
    core.Plan("slots", (30, 18), 4, reason="because"),
    used_bytes=1000,
    device="CPU",
    llama_cpp_commit="abc",
    edge_speq_version="0.1.0",
    foresight="twin",
    profile={"path": "p.json", "applied": {"n_threads": 2}},
    foreseen={"precision": 0.5, "recall": 0.5, "lead_tokens": 2.0},
)


def printed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps({"text": "a"} | STATS.to_dict()))
    return found


def properties(found: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, one in found.get("properties", {}).items():
        yield f"{where}.{name}", one
        yield from properties(one, f"{where}.{name}")
    if "items" in found:
        yield from properties(found["items"], f"{where}[]")


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_files_are_those_that_are_generated(name: str) -> None:
    made = generate.schemas()[name]
    assert schema.load(name) == made, "run python -m edge_speq.schema.generate"
    jsonschema.Draft202012Validator.check_schema(made)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_described_and_objects_are_closed(name: str) -> None:
    found = dict(properties(schema.load(name), name))
    assert found
    assert [key for key, one in found.items() if not one.get("description")] == []
    assert all(one["additionalProperties"] is False for one in found.values() if "properties" in one)
    assert [key for key, one in found.items() if one["description"] != one["description"].strip()] == []


def test_an_output_is_valid() -> None:
    jsonschema.validate(printed(), schema.load("run"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("unknown", 1),
        ("experts.unknown", 1),
        ("profile.applied.unknown", 1),
        ("n_prompt", "3"),
        ("n_prompt", -1),
        ("n_prompt", 1.5),
        ("text", None),
        ("experts.hit_rate", 1.01),
        ("experts.lossy", 0),
        ("experts.foresight", "guess"),
        ("experts.foreseen", []),
        ("memory.plan.placement", "gpu"),
        ("memory.plan.slots", [0]),
        ("memory.plan.resident", "1/2"),
        ("profile.applied.n_threads", 0),
    ],
)
def test_a_wrong_key_or_value_is_refused(path: str, value: Any) -> None:
    report = printed()
    *folders, name = path.split(".")
    place = report
    for folder in folders:
        place = place[folder]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema.load("run"))


@pytest.mark.parametrize("path", ["text", "experts.hits", "memory.plan.reason"])
def test_a_missing_key_is_refused(path: str) -> None:
    report = printed()
    *folders, name = path.split(".")
    place = report
    for folder in folders:
        place = place[folder]
    del place[name]
    with pytest.raises(jsonschema.ValidationError, match="required property"):
        jsonschema.validate(report, schema.load("run"))


@pytest.mark.parametrize("command", [["inspect"], ["doctor"]])
def test_commands_print_what_their_schema_says(
    command: list[str], bundled: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(bundled[0]), "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), schema.load(command[0]))


def test_a_line_of_the_step_log_has_the_fields_of_its_record() -> None:
    assert [f.name for f in dataclasses.fields(StepOutput)] == [f.name for f in dataclasses.fields(StepRecord)]
    line = dataclasses.asdict(StepRecord(3, 2, 1, None, None, 0, None, 0, 0.0, 0.0, 0.1, is_prompt=False))
    jsonschema.validate(line, schema.load("step"))
