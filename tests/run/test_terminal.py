"""Real commands on a real terminal, in CI, and in a pipe: progress, colours, JSON, completion, and words for mistakes."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from secateurs.printed import print_report
from secateurs.proof import environment as measured_with
from secateurs.report import BudgetRow, Report

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "secateurs"]
RECIPE = "examples/quickstart.yaml"
DRY = ["run", RECIPE, "--dry-run", "--set", "passes=[{mi-nodes: {target_macs: 0.6, grid: 2}}]"]
SHORT = ["run", RECIPE, "--dry-run", "--set", "passes=[{cka-cluster: {threshold: 0.8, max_blocks: 1, tolerance: 0.1}}]"]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
QUIET = ("CI", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in QUIET}
    return {**kept, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50", **more}


def on_terminal(*arguments: str, **more: str) -> tuple[int, str]:
    """Run a command whose output and errors are a pseudo-terminal; return its exit code and all that it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(**more), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written, deadline = b"", time.monotonic() + 240
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(30), written.decode(errors="replace")


def piped(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=240
    )


def test_a_terminal_shows_progress_with_the_time_left_and_colours():
    code, shown = on_terminal(*DRY)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "mi-nodes: allocation" in plain
    steps = re.findall(r"(\d+)/(\d+) .*?(\d+:\d\d:\d\d) +(-:--:--|\d+:\d\d:\d\d)", plain)
    assert steps
    assert any(left != "-:--:--" for _, _, _, left in steps)
    assert COLOUR.search(shown)
    assert re.search(r"remove units +stages", plain)
    assert re.search(r"MACs: 2,189,792 -> [\d,]+ \(0\.\d+\)", plain)


@pytest.mark.parametrize("variable", ["CI", "NO_COLOR"])
def test_ci_is_quiet_and_no_color_is_plain(variable):
    code, shown = on_terminal(*(SHORT if variable == "CI" else ["devices"]), **{variable: "1"})
    assert code == 0
    if variable == "CI":
        assert "looking for edits" not in shown
        assert "\x1b[?25l" not in shown  # the cursor is hidden while a bar is drawn
        assert "drop block" in shown
    else:
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)


def test_a_pipe_gets_no_colours_and_a_dry_run_writes_nothing(tmp_path):
    before = sorted(ROOT.iterdir())
    ended = piped(*SHORT, "--output", str(tmp_path / "out"), CI="1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "\x1b" not in ended.stdout
    assert "parameters: 186,042 ->" in ended.stdout
    for name in ("latency, predicted, ms", "peak memory, planned, MiB"):
        assert re.search(rf"^{name}: 0[.][0-9]+ -> 0[.][0-9]+ \([01][.][0-9]{{3}}\)$", ended.stdout, re.MULTILINE)
    assert not (tmp_path / "out").exists()
    assert sorted(ROOT.iterdir()) == before


@pytest.mark.parametrize(("variable", "shown"), [("NONE", True), ("CI", False)])
def test_a_log_gets_a_line_now_and_then(secateurs, monkeypatch, variable, shown):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("secateurs.progress.PAUSE", 0.0)
    ended = secateurs(*SHORT)
    assert ended.code == 0
    assert ("cka-cluster: 0 of 1 looking for edits" in ended.err) == shown
    assert bool(ended.err) == shown


@pytest.mark.parametrize("more", [{}, {"COLUMNS": "80"}])
def test_tables_are_whole_where_there_is_no_terminal(more):
    """Rich takes 80 columns there; who wants so says so."""
    plain = {name: value for name, value in environment(**more).items() if name != "COLUMNS" or more}
    command = [*COMMAND, "passes"]
    ended = subprocess.run(command, env=plain, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    widest = max(map(len, ended.stdout.splitlines()))
    assert widest == (80 if more else 160)


def test_one_pass_is_described(secateurs):
    shown = secateurs("passes", "mi-nodes")
    listed = json.loads(secateurs("passes", "mi-nodes", "--json").out)
    assert [item["name"] for item in listed] == ["mi-nodes"]
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line.split()}
    assert set(listed[0]["settings"]) <= set(lines)
    assert lines["target_macs"].split()[1:5] == ["none", "number", ">", "0"]
    assert lines["ignored_layers"].split()[1:5] == ["none", "list", "of", "string"]
    assert "Did you mean 'mi-nodes'" in secateurs("passes", "mi-node").err


def test_every_command_takes_json():
    from secateurs import cli
    from secateurs.manager import create_manager

    commands = cli.build_app(create_manager()).commands
    assert {"run", "inspect", "validate", "zoo", "bundle", "passes", "report", "devices"} <= set(commands)
    without = [
        name
        for name, command in commands.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []


def test_report_draws_the_page_again(quickstart, secateurs, tmp_path):
    folder, _ = quickstart
    page = folder / "report.html"
    drawn = page.read_text(encoding="utf-8")
    page.unlink()
    ended = secateurs("report", folder, "--json")
    report = json.loads((folder / "report.json").read_text())
    assert ended.code == (report["verdict"] != "pass")
    assert json.loads(ended.out) == {"page": str(page), "verdict": report["verdict"], "reasons": report["reasons"]}
    assert page.read_text(encoding="utf-8") == drawn
    assert "limit" in secateurs("report", folder).out


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "holds no `report.json`"),
        ("{", "does not have its form"),
        ('{"verdict": "maybe"}', "verdict: Input should be 'pass', 'fail' or 'undecided'"),
    ],
)
def test_report_says_what_is_wrong(secateurs, tmp_path, content, part):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    ended = secateurs("report", tmp_path)
    assert ended.code == 2
    assert part in ended.err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["pases"], "Did you mean 'passes'?"),
        (["reprot", "x"], "Did you mean 'report'?"),
        (["passes", "--jsn"], "--json"),
        (["run", RECIPE, "--overwrit"], "--overwrite"),
        (["run", RECIPE, "--set", "passes=[mi-node]"], "Did you mean 'mi-nodes'"),
        (["run", RECIPE, "--set", "pases=[]"], "'passes'"),
    ],
)
def test_mistakes_are_answered_with_the_nearest_name(secateurs, arguments, part):
    ended = secateurs(*arguments)
    assert ended.code == 2
    assert part in ended.err


def test_inspect_is_a_tree_that_says_what_goes_together(secateurs):
    shown = secateurs("inspect", RECIPE)
    lines = [re.sub(r"[│├└─]", " ", line) for line in shown.out.splitlines()]
    tree = {line.split()[0]: line for line in lines if line.split()}
    assert "7 of 9 can be bypassed whole" in shown.out
    assert "12 with 384 units" in shown.out
    assert any(re.fullmatch(r"\s+stages\.0\.0\.conv1 16 units read by stages\.0\.0\.conv2\s*", line) for line in lines)
    assert any(line.split()[:2] == ["together", "with"] and "stages.0.2.conv2" in line for line in lines)
    assert "nothing reads its units" in tree["head"]
    shares = [float(found) for found in re.findall(r"([\d.]+)% of the MACs", shown.out)]
    blocks = json.loads(secateurs("inspect", RECIPE, "--json").out)
    assert shares == pytest.approx([100 * one["macs"] / blocks["macs"] for one in blocks["blocks"]], abs=0.051)


@pytest.mark.parametrize(
    ("shell", "marker"),
    [("bash", "complete -o default -F"), ("zsh", "#compdef secateurs"), ("fish", "complete --command secateurs")],
)
def test_completion_is_there_for_each_shell(shell, marker):
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "_SECATEURS_COMPLETE": f"source_{shell}"}
    program = "import sys; sys.argv[0] = 'secateurs'; from secateurs.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(**variables), capture_output=True, text=True, timeout=60
    )
    assert marker in ended.stdout


def test_completion_names_the_commands_that_begin_so():
    variables = {"_SECATEURS_COMPLETE": "complete_bash", "COMP_WORDS": "secateurs r", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'secateurs'; from secateurs.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(**variables), capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.split() == ["run", "report"]


def test_the_version_is_that_of_the_package(secateurs):
    done = secateurs("--version")
    assert (done.code, done.out) == (0, f"secateurs {importlib.metadata.version('secateurs')}\n")


@pytest.mark.parametrize(
    ("limits", "status", "said"),
    [
        (
            [],
            "pass",
            "verdict: pass (no limits were given: `budget` in the recipe sets some) in 1.0 s; everything is in out",
        ),
        ([], "fail", "verdict: fail in 1.0 s; everything is in out"),
        (
            [BudgetRow(name="macs_ratio", limit=1, measured=0.5, status="pass")],
            "pass",
            "verdict: pass in 1.0 s; everything is in out",
        ),
    ],
    ids=["no limits", "failed for another reason", "limits"],
)
def test_a_run_without_limits_says_that_its_verdict_means_little(limits, status, said):
    console = Console(file=io.StringIO(), width=160)
    print_report(
        console, Report(verdict=status, environment=measured_with(0, 1), budget=limits, seconds=1.0), Path("out")
    )
    assert said in console.file.getvalue()
