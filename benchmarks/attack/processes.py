"""Experiments as processes that are killed, race, or run out of disk space."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.attack.outcomes import Outcome, Trial

__all__ = ["BINARIES", "Reference", "full_disk", "kills", "races"]

# Flags that make every binary as small as it can be.
_SMALL = (
    "--preset=demo",
    "--epochs=3",
    "--warmup_epochs=1",
    "--replicates=1",
    "--width=8",
    "--num_alphas=3",
    "--num_eval=100",
    "--num_match=100",
    "--num_train=300",
)
BINARIES = {
    "training_trajectories": ["--methods=weights", "--record_epochs=0,1,2,3", "--match_epochs=1"],
    "sgd_instability": ["--methods=weights", "--spawn_epochs=0,1"],
    "compare_methods": ["--methods=weights,activations", "--num_repair=50"],
    "learning_rates": ["--rates=0.01,0.1"],
}

# No small experiment takes longer, even on a busy machine; one that does hangs.
_TIMEOUT = 300


class Reference:
    """The results of each binary when nothing happens to it, and how long it took.

    Args:
      folder: where the runs are put.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        # Compiled programs are kept, so that a trial takes seconds.
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONFAULTHANDLER": "1",
        }
        self._results: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}

    def start(
        self, binary: str, output: pathlib.Path, *flags: str, limit: int | None = None
    ) -> subprocess.Popen[str]:
        """Start a binary; `limit` is the size in bytes beyond which it cannot write a file."""
        command = [sys.executable, "-m", f"experiments.{binary}", f"--output_dir={output}"]
        environment = dict(self.environment)
        if limit is not None:  # the cache of compiled programs is not what is tried
            del environment["JAX_COMPILATION_CACHE_DIR"]
        return subprocess.Popen(
            [*command, *_SMALL, *BINARIES[binary], *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=None if limit is None else _limiter(limit),
        )

    def results(self, binary: str) -> dict[str, Any]:
        """Return what the binary writes when nothing happens to it."""
        if binary not in self._results:
            output = self.folder / "reference" / binary
            for seconds in (True, False):  # the second run finds compiled programs, as the trials do
                target = output / str(seconds)
                began = time.perf_counter()
                status, errors = finish(self.start(binary, target))
                if status:
                    raise RuntimeError(f"{binary} fails without an attack: {errors}")
                self._seconds[binary] = time.perf_counter() - began
            self._results[binary] = read(output / "False")
        return self._results[binary]

    def seconds(self, binary: str) -> float:
        """Return how long the binary takes."""
        self.results(binary)
        return self._seconds[binary]

    def judge(self, name: str, binary: str, output: pathlib.Path, status: int, errors: str) -> Trial:
        """Judge a process that should have ended with the reference's results."""
        if "Traceback" in errors or status < 0:
            return Trial(name, Outcome.TRACEBACK, f"status {status}: {_last_line(errors)}")
        if status:
            return Trial(name, Outcome.LOST, f"status {status}: {_last_line(errors)}")
        found, wanted = read(output), self.results(binary)
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            return Trial(name, Outcome.SILENT, f"other {', '.join(different)}")
        return Trial(name, Outcome.RIGHT)


def _limiter(limit: int) -> Callable[[], None]:
    import resource  # not on Windows

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit status and what it printed on stderr."""
    try:
        _, errors = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return -1, "hangs"
    return process.returncode, errors


def read(output: pathlib.Path) -> dict[str, Any]:
    """Read the results and the names of all files of a finished run, without times."""
    content = json.loads((output / "results.json").read_text())
    chosen = {key: content[key] for key in ("config", "records", "summary", "claims")}
    files = sorted(path.name for path in output.iterdir() if path.is_file())
    return {**_without_times(chosen), "files": files}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key != "seconds"}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def _last_line(errors: str) -> str:
    return (errors.strip().splitlines() or [""])[-1][:200]


def kills(reference: Reference, num: int, rng: random.Random) -> Iterator[Trial]:
    """Kill binaries at random moments and resume them; every fifth is interrupted instead."""
    for i in range(num):
        binary = list(BINARIES)[i % len(BINARIES)]
        moment, interrupted = rng.uniform(0, reference.seconds(binary)), i % 5 == 4
        name = f"{binary} {'interrupted' if interrupted else 'killed'} after {moment:.2f} s"
        output = reference.folder / "kills" / str(i)
        process = reference.start(binary, output)
        time.sleep(moment)
        process.send_signal(signal.SIGINT if interrupted else signal.SIGKILL)
        status, errors = finish(process)
        # Ctrl-C before Python has begun ends the process by the signal itself.
        if interrupted and (
            "Traceback" in errors or status not in (0, 130, -signal.SIGINT) or errors.count("\n") > 2
        ):
            yield Trial(name, Outcome.TRACEBACK, f"status {status}: {_last_line(errors)}")
            continue
        yield reference.judge(name, binary, output, *finish(reference.start(binary, output, "--resume")))


def races(reference: Reference, num: int, rng: random.Random) -> Iterator[Trial]:
    """Start two or three processes at once, in one output folder or with one folder of networks."""
    for i in range(num):
        binary, shared = list(BINARIES)[i % len(BINARIES)], i % 2 == 0
        count = 2 + (i // 2) % 2
        reference.results(binary)
        folder = reference.folder / "races" / str(i)
        outputs = [folder / ("out" if shared else f"out{k}") for k in range(count)]
        flags = [] if shared else ["--keep_checkpoints=all", f"--runs_dir={folder / 'runs'}"]
        name = f"{count} × {binary}, one {'output folder' if shared else 'folder of networks'}"
        processes = []
        for output in outputs:
            processes.append(reference.start(binary, output, *flags))
            time.sleep(rng.choice((0, 0, 0.3)))
        ends = [finish(process) for process in processes]
        refused = [errors for status, errors in ends if status == 1 and "is in use by process" in errors]
        trials = [
            reference.judge(name, binary, output, *end)
            for output, end in zip(outputs, ends, strict=True)
            if end[1] not in refused
        ]
        worst = next((trial for trial in trials if trial.outcome != Outcome.RIGHT), None)
        if not trials or (refused and not shared):
            worst = Trial(name, Outcome.LOST, f"{len(refused)} of {count} refused")
        yield worst or Trial(name, Outcome.RIGHT, f"{len(refused)} of {count} refused")


def full_disk(reference: Reference, num: int, rng: random.Random) -> Iterator[Trial]:
    """Run binaries that cannot write files beyond a random size, and resume them without that limit."""
    for i in range(num):
        binary = list(BINARIES)[i % len(BINARIES)]
        limit = int(10 ** rng.uniform(1.5, 5))
        name = f"{binary} with at most {limit} bytes a file"
        output = reference.folder / "full" / str(i)
        status, errors = finish(reference.start(binary, output, limit=limit))
        if "Traceback" in errors or status not in (0, 1) or errors.count("\n") > 2:
            yield Trial(name, Outcome.TRACEBACK, f"status {status}: {_last_line(errors)}")
            continue
        trial = reference.judge(name, binary, output, *finish(reference.start(binary, output, "--resume")))
        if status and trial.outcome == Outcome.RIGHT:
            trial = trial._replace(outcome=Outcome.REFUSED, detail=_last_line(errors))
        yield trial
