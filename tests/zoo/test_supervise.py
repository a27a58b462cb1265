"""One model under watch: what ends its process, and what is made of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from secateurs_adapters.zoo.results import Job
from secateurs_adapters.zoo.supervise import Stopped, supervise
from secateurs_adapters.zoo.worker import WAITING


class Program:
    """Launches a program of our own in place of a model's process; otherwise as `launch.Fresh` does."""

    def __init__(self, source: str) -> None:
        self.source, self.started = source, []

    def start(self, job):
        from secateurs_adapters.zoo.launch import _FreshProcess

        command = [sys.executable, "-S", "-c", self.source, str(job.stage_path), str(job.attempt)]
        process = subprocess.Popen(command, start_new_session=True)
        self.started.append(process.pid)
        return _FreshProcess(process)

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def job(tmp_path):
    return Job(
        name="a",
        key="0" * 32,
        recipe="",
        source="r.yaml",
        output=tmp_path,
        directory=tmp_path,
        environment="",
        timeout=1.0,
        memory_mib=None,
        retries=1,
        threads=1,
    )


def test_a_signal_is_a_crash_that_is_tried_again(job):
    program = Program("import os; os.abort()")
    result = supervise(job, program)
    assert (result.status, result.attempts, len(program.started)) == ("crashed", 2, 2)
    assert "SIGABRT" in result.reasons[0]
    assert job.result() == result


def test_an_end_without_a_result_is_a_crash(job):
    result = supervise(job, Program("import os; os._exit(3)"))
    assert result.status == "crashed"
    assert "exit code 3 and no result" in result.reasons[0]


def test_retries_are_counted(job):
    program = Program("import os; os.abort()")
    assert supervise(job.model_copy(update={"retries": 0}), program).attempts == 1
    job.result_path.unlink()
    assert supervise(job.model_copy(update={"retries": 3}), program).attempts == 4


def test_a_result_that_a_second_process_writes_counts(job):
    job.keep(job.ended("pass", []))
    body = job.result_path.read_text()
    job.result_path.unlink()
    source = f"import sys, os\nif sys.argv[2] == '1': os.abort()\nopen({str(job.result_path)!r}, 'w').write({body!r})"
    assert supervise(job, Program(source)).status == "pass"


def test_time_over_the_limit_ends_the_process_and_what_it_started(job):
    source = "import subprocess, sys; subprocess.Popen(['sleep', '97']); import time; time.sleep(98)"
    program = Program(source)
    began = time.monotonic()
    result = supervise(job, program)
    assert (result.status, result.attempts) == ("timeout", 1)
    assert 1 <= time.monotonic() - began < 20
    assert "1 s" in result.reasons[0]
    assert not psutil.pid_exists(program.started[0])
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "97"]]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_waiting_for_a_turn_to_measure_does_not_count(job):
    source = (
        f"import sys, time; open(sys.argv[1], 'w').write({WAITING!r}); time.sleep(2.5); "
        "open(sys.argv[1], 'w').write('measuring'); import os; os.abort()"
    )
    result = supervise(job.model_copy(update={"retries": 0, "timeout": 2.0}), Program(source))
    assert result.status == "crashed"
    assert result.waited_seconds == pytest.approx(2.5, abs=1.0)
    assert "while measuring" in result.reasons[0]


def test_a_stage_that_is_told_at_once_is_heard(job):
    class Slow(Program):
        def start(self, job):
            process = super().start(job)
            while not job.stage_path.exists() or not job.stage_path.read_text():
                time.sleep(0.01)
            return process

    job.stage_path.parent.mkdir(parents=True)
    job.stage_path.write_text("of an earlier attempt")
    source = (
        "import os, sys, time; path = sys.argv[1]; assert not os.path.exists(path); "
        f"open(path, 'w').write({WAITING!r}); time.sleep(1); os.abort()"
    )
    result = supervise(job.model_copy(update={"retries": 0, "timeout": 30.0}), Slow(source))
    assert f"while {WAITING}" in result.reasons[0]
    assert result.waited_seconds == pytest.approx(1.0, abs=0.5)


def test_memory_over_the_limit_ends_the_process_whoever_of_its_family_holds_it(job):
    hold = "x = bytearray(200 * 2**20); import time; time.sleep(60)"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {hold!r}])"
    limited = job.model_copy(update={"memory_mib": 150, "timeout": 30.0})
    for program in (Program(hold), Program(source)):
        job.result_path.unlink(missing_ok=True)
        result = supervise(limited, program)
        assert (result.status, result.attempts) == ("out-of-memory", 1)
        assert "`memory_mib` allows 150" in result.reasons[0]
        assert result.peak_rss_bytes > 150 * 2**20


def test_a_stopped_zoo_leaves_the_result_open(job):
    program = Program("import time; time.sleep(60)")
    with pytest.raises(Stopped):
        supervise(job.model_copy(update={"timeout": 30.0}), program, lambda: bool(program.started))
    assert job.result() is None
    assert not psutil.pid_exists(program.started[0])


def test_a_process_ends_with_the_one_that_watches_over_it(tmp_path):
    watched = (
        "import sys, time; from secateurs_adapters.zoo.worker import end_with; end_with(int(sys.argv[1])); "
        "print('ready', flush=True); time.sleep(60)"
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", watched, str(read)], pass_fds=(read,), stdout=subprocess.PIPE, start_new_session=True
    )
    with process:
        assert process.stdout.readline() == b"ready\n"
        os.close(write)
        assert process.wait(10) == -signal.SIGKILL
    os.close(read)
