"""Damaged files end `secateurs validate` with an exit code and in words, in time and within memory."""

import json
import os
import random
import subprocess
import sys

import foreign
import pytest
import shipped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the figures of an ended process need getrusage")

SECONDS, BYTES = 30, 2 * 2**30
EXPORTS = ("quickstart", "resnet20-pruned", "transformer")


LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)]))
"""
"""Runs a command from a small process: the largest resident set of a process counts what it was forked from, too."""


def validate(before, after):
    """Run the command in a process of its own; return exit code, what it said, seconds, seconds of processor, and bytes.

    The bytes are a bound: twice the largest resident set among the command and all that it started, which it does one after the other.
    """
    command = ["-m", "secateurs", "validate", str(before), str(after), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, *command], capture_output=True, text=True, check=True
    )
    code, seconds, processor, largest = json.loads(done.stdout)
    return {
        "file": after.name,
        "code": code,
        "said": done.stderr,
        "seconds": seconds,
        "processor_seconds": processor,
        "bytes": 2 * largest,
    }


def faults(row):
    """Return what is wrong; seconds are those of a machine with nothing else to do, so that one with more work than cores allows more."""
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    found = {
        "exit code": row["code"] not in (0, 1, 2, 3),
        "traceback": "Traceback" in row["said"],
        "no reason": row["code"] > 1 and "error: " not in row["said"],
        "too long": row["seconds"] > SECONDS * crowd or row["processor_seconds"] > SECONDS,
        "too much memory": row["bytes"] > BYTES,
    }
    return [name for name, wrong in found.items() if wrong]


@pytest.mark.parametrize("kind", range(len(foreign.KINDS)), ids=foreign.KINDS)
def test_a_damaged_file_ends_in_time_and_within_memory(tmp_path, kind):
    before, after = foreign.mutants(tmp_path, kind + 1, seed=11)[kind]
    assert foreign.KINDS[kind] in after.name
    row = validate(before, after)
    assert faults(row) == [], row


@pytest.mark.long
@pytest.mark.timeout(10_000)
def test_two_hundred_damaged_files_end_in_time_and_within_memory(tmp_path, exported):
    """Files of others and exports of ours; the damaged one after the whole one, before it, or on both sides."""
    generator = random.Random(0)
    whole = {name: make(tmp_path / f"{name}.onnx", 13) for name, make in foreign.FAMILIES.items()}
    whole |= {name: exported(name) for name in EXPORTS if name != "resnet20-pruned" or shipped.WEIGHTS.is_file()}
    rows, wrong = [], {}
    for before, after in foreign.mutants(tmp_path, 200, files=whole):
        pair = generator.choice([(before, after), (before, after), (after, before), (after, after)])
        row = validate(*pair)
        row["file"] = after.name
        rows.append(row)
        if found := faults(row):
            wrong[after.name] = (found, row)
    report = tmp_path / "mutants.json"
    report.write_text(json.dumps(rows, indent=1))
    codes = [row["code"] for row in rows]
    largest = {key: max(row[key] for row in rows) for key in ("seconds", "processor_seconds", "bytes")}
    print(f"{report}: exit codes {[codes.count(code) for code in range(4)]}, at most {largest}")
    assert wrong == {}
