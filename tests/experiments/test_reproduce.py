"""The command that runs all experiments: its plans, their cost, failures, and going on after a kill."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import app, flags
from absl.testing import flagsaver
from small_experiment import reporter

from experiments import reproduce
from experiments.report import cost
from experiments.report.plans import PLANS, Section
from experiments.report.registry import BINARIES
from experiments.report.runner import is_done, prepare, run_tasks
from experiments.report.settings import command_of, config_of, flags_of
from rebasin.training.lock import locked

ROOT = pathlib.Path(__file__).parents[2]
CHILDREN = ROOT / "results" / "digits_mlp_instability"
STORED = json.loads((CHILDREN / "results.json").read_text())
HELD = sum(claim["holds"] for claim in STORED["claims"])
COPY = "import pathlib, shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"


def call(*arguments):
    with flagsaver.flagsaver():
        flags.FLAGS(["reproduce", *arguments])
        try:
            reproduce.main(["reproduce"])
        except SystemExit as stopped:
            return stopped.code
    return 0


@pytest.mark.parametrize("preset", PLANS)
def test_every_section_of_a_plan_can_run_and_finds_its_networks(preset):
    sections = PLANS[preset]
    assert len({section.name for section in sections}) == len(sections)
    stored = {}
    for section in sections:
        names = {flag[2:].partition("=")[0] for flag in section.flags}
        assert names <= flags_of(section.binary)
        config = config_of(section.binary, [f"--preset={preset}", *section.flags])
        kept = [flag.partition("=")[2] for flag in section.flags if flag.startswith("--keep_checkpoints")]
        for pair in config.pairs:
            for seed in pair.seeds:
                # A network that is stored in part is not completed, so a later section must not want more.
                assert set(config.wanted_epochs) <= stored.get((pair.recipe, seed), set(config.wanted_epochs))
                if kept == ["measured"]:
                    stored[pair.recipe, seed] = set(config.wanted_epochs)


def test_a_plan_has_every_experiment():
    experiments = {name for name, binary in BINARIES.items() if binary.writes == name}
    for preset in ("demo", "digits", "paper"):
        assert {section.binary for section in PLANS[preset]} == experiments
    assert {section.binary for section in PLANS["cpu"]} == experiments - {"mask_transport_widths"}


def test_networks_and_levels_of_earlier_sections_cost_nothing():
    small = ("--preset=digits", "--replicates=2", "--levels=3", "--methods=weights", "--rewind_epoch=5")
    plan = ("training_trajectories", "sparse_connectivity", "mask_transport")
    sections = [Section(name, name) for name in plan]
    configs = [
        config_of(s.binary, [f for f in small if f[2:].partition("=")[0] in flags_of(s.binary)])
        for s in sections
    ]
    dense, sparse, masks = cost.count_costs(sections, configs, ["all"] * 3)
    assert (dense.networks, dense.epochs) == (4, 4 * 30)
    # Two networks a level and replicate, trained from epoch 5 on.
    assert (sparse.networks, sparse.epochs) == (12, 12 * 25)
    # Three masks of B and two for the method, beside the levels, which are there.
    assert masks.networks == 5 * 3 * 2
    alone = cost.count_costs(sections[2:], configs[2:], ["ends"])[0]
    assert alone.networks == 4 + 7 * 3 * 2
    megabytes = 4 * (64 * 128 + 2 * 128 * 128 + 128 * 10 + 3 * 128 + 10) / 1e6
    assert dense.gigabytes == pytest.approx(2 * 4 * 31 * megabytes / 1e3)


def test_hours_follow_from_the_measured_rates():
    sections = [Section("vgg16", "training_trajectories")]
    one, five = (
        cost.count_costs(
            sections, [config_of("training_trajectories", ["--preset=paper", f"--replicates={n}"])], ["all"]
        )[0]
        for n in (1, 5)
    )
    # A pair is 300 epochs of 1.00 s, and a sweep of 25 alphas and 20,000 images 1.39 s.
    sweeps = one.points / 25
    assert sweeps == 18 * (1 + 2 * 11)
    assert one.hours * 3600 == pytest.approx(300 + 1.39 * sweeps + 36 * 1.55 + 35, rel=0.01)
    assert five.networks == 10
    assert cost.makespan([five], 5) == pytest.approx(five.hours / 5)


def test_the_cost_of_the_paper_stands_in_the_docs(capsys):
    assert call("--preset=paper", "--plan") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.strip() in (ROOT / "docs/cost.md").read_text()


def test_given_flags_go_to_the_sections_that_have_them(capsys):
    only = "--only=training_trajectories,learning_rates"
    assert (
        call(
            "--preset=digits",
            "--plan",
            only,
            "--replicates=1",
            "--epochs=3",
            "--record_epochs=0,3",
            "--match_epochs=3",
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines if "training_trajectories " in line] == [["2", "6"]]
    assert [line.split()[1:3] for line in lines if "learning_rates " in line] == [["8", "24"]]


@pytest.mark.parametrize("flag", ["--resume", "--time_limit=9", "--spawn_epochs=1"])
def test_flags_that_no_section_takes_are_refused(flag):
    with pytest.raises(app.UsageError, match=f"no section of a reproduction takes {flag.partition('=')[0]}"):
        call("--preset=digits", "--plan", "--only=loss_landscape", flag)


def test_what_is_wrong_is_one_message(tmp_path):
    assert (
        call("--preset=digits")
        == "error: --output_dir is empty; name a folder for the results and the report"
    )
    assert call("--only=loss", "--plan").startswith(
        "error: --only: preset 'digits' has no section 'loss'; it has"
    )
    assert call(f"--results={tmp_path}", f"--output_dir={tmp_path}") == (
        f"error: {tmp_path} holds no results.json of an experiment"
    )
    message = call(
        "--output_dir=out", "--replicates=1", "--num_alphas=4", "--only=learning_rates,loss_landscape"
    )
    assert message.startswith(
        "error: these sections cannot run:\n  learning_rates: this experiment cannot work:"
    )
    assert not pathlib.Path("out").exists()


def test_results_of_other_options_are_refused_before_anything_runs(tmp_path):
    folder = tmp_path / "sgd_instability"
    folder.mkdir()
    (folder / "results.json").write_bytes((CHILDREN / "results.json").read_bytes())
    message = call("--only=sgd_instability", f"--output_dir={tmp_path}", "--seed=7")
    assert "is of another config; choose another folder" in message
    assert not (folder / "log.txt").exists()


def children(folder, name="sgd_instability", command=None):
    """A section that copies committed results instead of measuring them."""
    section = Section(name, "sgd_instability", seconds=9)
    arguments, _ = command_of("sgd_instability", STORED["config"])
    (task,) = prepare([section], lambda _: [*arguments, f"--output_dir={folder / name}"])
    return task._replace(command=command or (sys.executable, "-c", COPY, str(CHILDREN), str(task.folder)))


def test_a_section_that_fails_does_not_stop_the_others(tmp_path):
    say = "print('error: no such luck'); raise SystemExit(3)"
    kill = "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"
    tasks = [
        children(tmp_path, "says", (sys.executable, "-c", say)),
        children(tmp_path, "dies", (sys.executable, "-c", kill)),
        children(tmp_path, "silent", (sys.executable, "-c", "")),
        children(tmp_path),
    ]
    text = reporter()
    failures = run_tasks(tasks, text)
    assert failures == {
        "says": "no such luck (exit status 3)",
        "dies": "so far (signal 9)",
        "silent": "it wrote nothing (exit status 0)",
    }
    assert [is_done(task) for task in tasks] == [False, False, False, True]
    printed = text.console.file.getvalue()
    assert "4/4 sgd_instability: about" in printed
    assert f"{HELD} of {len(STORED['claims'])} claims hold" in printed
    assert max(map(len, printed.replace(str(tmp_path), "out").splitlines())) <= 80
    # Done ones are not run again.
    assert run_tasks(tasks[3:], reporter()) == {}
    reproduce.write_report(tmp_path, tmp_path / "report", inline=False, failures=failures)
    page = (tmp_path / "report" / "report.md").read_text()
    assert "says failed: no such luck (exit status 3)" in page
    assert (tmp_path / "report" / "index.html").is_file()


def test_a_section_that_lost_a_figure_is_drawn_again(tmp_path):
    task = children(tmp_path)
    assert run_tasks([task], reporter()) == {}
    (task.folder / "sgd_instability.png").unlink()
    assert not is_done(task)
    assert run_tasks([task], reporter()) == {}
    assert (task.folder / "sgd_instability.png").is_file()


def test_a_section_that_still_runs_is_waited_for(tmp_path):
    task, text = children(tmp_path), reporter()
    task.folder.mkdir()
    held = threading.Event()

    def hold():
        with locked(task.folder):
            held.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert run_tasks([task], text) == {}
    holder.join()
    assert f"waiting for process {os.getpid()}" in text.console.file.getvalue()


# Three sections of one network each, in seconds.
TINY = (
    "--preset=digits",
    "--only=training_trajectories,weight_magnitude,loss_landscape",
    "--replicates=1",
    "--width=8",
    "--epochs=3",
    "--num_alphas=3",
    "--record_epochs=0,1,3",
    "--match_epochs=1",
    "--prune_epochs=1",
    "--plane_epochs=1",
    "--grid_size=5",
)


def start(folder):
    command = [sys.executable, "-m", "experiments.reproduce", *TINY, f"--output_dir={folder}"]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(folder):
    assert start(folder).wait() == 0, pathlib.Path(f"{folder}.log").read_text()


def wait_for_a_section(process, folder, since):
    """Wait until a section has begun, or the reproduction is over."""
    while process.poll() is None and not any(
        log.stat().st_mtime >= since and log.stat().st_size for log in folder.glob("*/log.txt")
    ):
        time.sleep(0.1)


def report_of(folder):
    """The report without the seconds, which are the only thing that a kill may change."""
    page = (folder / "report" / "index.html").read_text()
    text = (folder / "report" / "report.md").read_text()
    return (
        re.sub(r'<span class="seconds">.*?</span>', "", page),
        re.sub(r"[\d,]+ s \(.*?\)|\d+ (s|min)\.", "", text),
    )


def kill_sections(folder):
    """Kill the section that runs, too, where one does; its lock names it."""
    for lock in folder.glob("*/in_use.lock"):
        words = lock.read_text().split()
        line = pathlib.Path("/proc", words[1], "cmdline") if len(words) > 1 else None
        # A stale lock may name a process that is somebody else's by now.
        if line and line.exists() and os.fsencode(folder) in line.read_bytes():
            os.kill(int(words[1]), signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_random_a_reproduction_ends_with_the_same_report(tmp_path):
    began = time.monotonic()
    # Both have one name, which stands in the report.
    whole, folder = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    for parent in (whole.parent, folder.parent):
        parent.mkdir()
    finish(whole)
    took = time.monotonic() - began
    draw, kills = random.Random(0), 0
    while kills < 10:
        since = time.time()
        process = start(folder)
        wait_for_a_section(process, folder, since)
        try:
            process.wait(draw.uniform(0, 0.1 * took))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            # Every other time the section goes on alone, and the next reproduction waits for it.
            if kills % 2:
                kill_sections(folder)
    finish(folder)
    assert kills >= 3
    assert report_of(folder) == report_of(whole)
