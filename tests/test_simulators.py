"""A simulator of one's own: on every command that plays, and what is said of one that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from fakes import FakePolicy, FakeWorld, Table
from policies import save_policy

from tsad import sim
from tsad.sim.results import read_results
from tsad.sim.simulators import SimulatorError, register_own, stepped

SHORT = ["--sampler", "ddim", "--steps", "2"]
# The table of fakes.py, as somebody would write it; `extra` is put into the class.
ROBOT = """
import numpy as np
import tsad


class Robot:
    name, obs_dim, action_dim, max_steps = "robot", 6, 2, 23
    obs_meaning = "three numbers, twice"
    {extra}

    def reset(self, seed):
        self.position = np.random.default_rng(seed).normal(size=3)
        return self.seen()

    def step(self, action):
        self.position = self.position * 0.9
        self.position[:2] += 0.1 * np.asarray(action, np.float64)
        score = float(np.abs(self.position).sum() * 1e3 % 1)
        return tsad.sim.Step(self.seen(), score, score > 0.93, score > 0.93)

    def seen(self):
        return np.resize(self.position, 6)

    def close(self):
        pass


def make():
    return Robot()


number = 7
"""


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a policy and a robot.py; what was registered and imported is forgotten."""
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    save_policy(tmp_path / "policy")
    write()
    for name in ("robot", "broken", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("robot", "broken", "needy"):
        sys.modules.pop(name, None)


def write(extra: str = "", old: str = "", new: str = "") -> None:
    text = ROBOT.format(extra=extra)
    assert old in text
    Path("robot.py").write_text(text.replace(old, new))
    sys.modules.pop("robot", None)


def command(name: str, *more: str) -> list[str]:
    return [name, "--simulator", "robot:make", "--policy", "policy", *more]


def episodes(path: str) -> Any:
    settings, found = read_results(Path(path))
    return settings, sorted((e.seed, e.score, e.success, e.steps, e.chunks) for e in found)


# ---- every command that plays


@pytest.mark.parametrize("where", ["robot:make", "robot:Robot"])
def test_eval_plays_it(capsys: Any, monkeypatch: Any, where: str) -> None:
    """As it plays the same world that is registered; in this process and in others."""
    sim.register("table", "fakes:Table", first_seed=100_000)
    code, _, err = run(
        capsys, "eval", "table", "--policy", "policy", "--seeds", "6", "--out", "t.json", *SHORT
    )
    assert code == 0, err
    line = ["eval", "--simulator", where, "--policy", "policy", "--seeds", "6", *SHORT]
    for more in (["--out", "a.json"], ["--out", "b.json", "--jobs", "2", "--lanes", "2"]):
        sys.modules.pop("robot", None)
        code, out, err = run(capsys, *line, *more)
        assert code == 0 and f"{where}, seeds 100000 to 100005, policy policy" in out, err
    settings, found = episodes("a.json")
    assert found == episodes("b.json")[1] == episodes("t.json")[1]
    assert settings == episodes("b.json")[0]
    assert settings["simulator"] == where and len(settings["simulator_sha256"]) == 64
    assert str(Path.cwd()) == sys.path[0]

    # what is played has changed: no going on
    write(extra="# faster now")
    code, _, err = run(capsys, *line, "--out", "a.json", "--resume")
    assert code == 2 and "simulator_sha256: the file has" in err


def test_from_a_shell(tmp_path: Path) -> None:
    """The current folder is where modules are looked for, though Python itself does not."""
    code = "import sys; from tsad.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = command("eval", "--seeds", "2", "--json", *SHORT)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p != str(tmp_path))},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["simulator"] == "robot:make"


def test_a_factory_says_what_decides_its_results(capsys: Any) -> None:
    write(extra="packages, first_seed = ('numpy', 'no-such-package'), 500")
    line = ["eval", "--simulator", "robot:Robot", "--policy", "policy", "--seeds", "2"]
    code, out, err = run(capsys, *line, "--json", *SHORT)
    assert code == 0, err
    found = json.loads(out)
    assert found["settings"]["packages"] == {"numpy": np.__version__}
    assert found["summary"]["first_seed"] == 500


def test_the_other_commands_play_it(capsys: Any) -> None:
    code, out, err = run(
        capsys, *command("collect", "--out", "recorded", "--episodes", "3"), *SHORT
    )
    assert code == 0 and "3 episodes, 3 of them new" in out, err
    facts = json.loads(Path("recorded/collection.json").read_text())["settings"]
    assert facts["simulator"] == "robot:make" and facts["simulator_sha256"]
    code, out, err = run(
        capsys, *command("collect", "--out", "recorded", "--episodes", "4"), *SHORT
    )
    assert code == 0 and "4 episodes, 1 of them new" in out, err

    rows = [{"name": "two", "steps": 2, "sampler": "ddim"}]
    rows += [{"name": "one", "steps": 1, "sampler": "ddim"}]
    Path("grid.json").write_text(json.dumps(rows))
    grid = ["--settings", "grid.json", "--seeds", "3"]
    code, out, err = run(capsys, *command("eval", *grid, "--out", "sweep"))
    assert code == 0 and "robot:make, seeds 100000 to 100002" in out, err
    options = ["--observations", "recorded", "--draws", "2", "--rounds", "1", "--jobs", "2"]
    code, out, err = run(capsys, *command("tune", *grid, "--out", "tuned", *options))
    assert code == 0, err
    assert json.loads(Path("tuned/tune.json").read_text())["simulator"] == "robot:make"


def test_realtime_needs_rest(capsys: Any) -> None:
    line = command("eval", "--seeds", "2", "--realtime", "10", "--latency", "150", *SHORT)
    code, _, err = run(capsys, *line, "--out", "r.json")
    assert code == 2 and "--realtime: the simulator 'robot:make' has no rest_action" in err
    assert not list(Path().glob("r.json*"))
    write(extra="def rest_action(self): return self.position[:2]")
    code, out, err = run(capsys, *line)
    assert code == 0 and "late     1 tick" in out, err
    write(extra="def rest_action(self): return self.position")
    code, _, err = run(capsys, *line)
    assert code == 1 and "the action of rest_action(): expected 2 finite numbers, got shape" in err


COPYABLE = """
    def snapshot(self): return (self.position.copy(),)
    def restore(self, snapshot):
        (self.position,) = snapshot
        return self.seen()
"""


def test_generate(capsys: Any) -> None:
    """Demonstrations of a world that tells no state are of its observations."""
    line = command("generate", "--out", "more.npz", "--seeds", "20:26", "--start", "0.2", *SHORT)
    code, _, err = run(capsys, *line)
    assert code == 2 and "can't be copied: it has no snapshot and no restore; give it" in err
    write(extra=COPYABLE)
    code, out, err = run(capsys, *line)
    assert code == 0, err
    made = np.load("more.npz")
    assert set(made.files) == {"obs", "action", "episode_ends", "seed", "next_seed", "settings"}
    assert made["obs"].shape == (made["episode_ends"][-1], 6) and made["action"].shape[1] == 2
    assert "simulator_sha256" in json.loads(str(made["settings"]))
    starts = [0, *made["episode_ends"][:-1]]
    for seed, start in zip(made["seed"], starts, strict=True):
        np.testing.assert_array_equal(made["obs"][start], Table().reset(int(seed)))
    code, _, err = run(capsys, *line[:5], "--out", "more.npz", "--seeds", "20:28", "--resume",
                       "--start", "0.2", *SHORT)  # fmt: skip
    assert code == 0, err


# ---- what is wrong with it

BROKEN: list[tuple[str, str, str]] = [
    ("robot", "", "got 'robot', expected MODULE:FACTORY, e.g. my_robot:make"),
    ("robot:", "", "got 'robot:', expected MODULE:FACTORY"),
    (":make", "", "got ':make', expected MODULE:FACTORY"),
    ("robots:make", "", r"no module 'robots' is in /.* or installed; expected MODULE:FACTORY\n"),
    ("robot.py:make", "", "no module 'robot.py' is in .*; expected MODULE:FACTORY; without .py"),
    ("robot:mak", "", r"got 'mak' of /.*robot\.py, which it does not have; .*: make\?"),
    ("robot:number", "", "got 'number' of .*, which is not callable; expected a function or class"),
    ("needy:make", "import no_such_package_of_ours", "'needy' can't be imported: ModuleNotFound"
     r"Error: No module named 'no_such_package_of_ours' \(.*needy\.py, line 1\)"),
    ("broken:make", "def make(:", r"the module 'broken' can't be imported: SyntaxError"),
    ("broken:make", "import sys; sys.exit(3)", r"'broken' can't be imported: SystemExit: 3 \(.*l"),
    ("broken:make", "def make(x): pass", r"broken:make\(\) failed: TypeError: make\(\) missing 1"),
    ("broken:make", "def make(): return 1 / 0", r"failed: ZeroDivisionError: .*broken\.py, line 1"),
    ("broken:make", "def make(): pass", r"broken:make\(\) gives a NoneType without name, obs_mean"),
    (
        "broken:make",
        "class make:\n    observation_space = action_space = None\n    def reset(self): pass\n"
        "    def step(self, a): pass\n    def close(self): pass",
        "gives a make without name, obs_meaning, obs_dim, action_dim, max_steps, expected all that "
        "tsad.sim.Environment says; wrap the gymnasium environment",
    ),
    ("to/robot.py:make", "", "or installed; expected MODULE:FACTORY; a module, not a path: "
     r"robot:make, called in to\n"),
    ("broken:make", "import tsad\ndef make(): raise tsad.sim.SimulatorError('no X: pip install x')",
     r"no X: pip install x\n"),
]  # fmt: skip


OUT = {
    "eval": ["--out", "r.json"],
    "collect": ["--out", "c"],
    "tune": ["--out", "t", "--settings", "s.json"],
    "generate": ["--out", "g.npz", "--seeds", "1:3"],
}
# one command tells them all; the others are asked for one of each way to be found out
REFUSED = [("eval", *case) for case in BROKEN]
REFUSED += [(name, *BROKEN[i]) for name in ("collect", "tune", "generate") for i in (5, 11)]


@pytest.mark.parametrize(("name", "where", "source", "message"), REFUSED)
def test_what_is_no_simulator(
    capsys: Any, name: str, where: str, source: str, message: str
) -> None:
    Path("broken.py").write_text(source)
    Path("needy.py").write_text(source)
    Path("s.json").write_text('[{"name": "a"}, {"name": "b", "sparsity": 0.5}]')
    before = sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")
    code, _, err = run(capsys, name, "--simulator", where, "--policy", "policy", *OUT[name])
    assert code == 2 and re.search(f"argument --simulator: .*{message}", err), err
    after = sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")
    assert after == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("action_dim, max_steps =", "action_dims, max_steps =", "a Robot without action_dim, exp"),
        ("= \"robot\", 6,", "= \"robot\", 6.0,", "a Robot whose obs_dim is 6.0, expected an int"),
        ("2, 23", "2, 0", "a Robot whose max_steps is 0, expected an int of at least 1; set it"),
        ("    def close", "    def shut", r"a Robot without close\(\), expected all"),
        ("= \"robot\", 6,", "= \"robot\", 7,", "--policy: .*obs_dim is 6, but the simulator 'r"),
    ],
)  # fmt: skip
def test_members_are_checked(capsys: Any, old: str, new: str, message: str) -> None:
    write(old=old, new=new)
    code, _, err = run(capsys, *command("eval", "--out", "r.json"))
    assert code == 2 and re.search(message, err), err
    assert not list(Path().glob("r.json*"))


STEPS: list[tuple[str, str, str]] = [
    ("return np.resize(self.position, 6)", "return np.resize(self.position, (2, 6))",
     r"simulator 'robot': the observation of reset\(100000\): expected 6 finite numbers, got shape "
     r"\(2, 6\); return one row of 6 numbers"),
    ("return np.resize(self.position, 6)", "return 0.5", r"got shape \(\); return one row"),
    ("return np.resize(self.position, 6)", "return np.resize(self.position, 6) > 0", "got bool; "),
    ("return np.resize(self.position, 6)", "return ['a'] * 6", "got <U1; return a NumPy array"),
    ("        return self.seen()", "        return self.seen(), {}",
     r"the observation of reset\(100000\): expected 6 finite numbers, got tuple of 2; return a "),
    ("tsad.sim.Step(self.seen(), score, score > 0.93, score > 0.93)",
     "self.seen(), score, score > 0.93, False, {}",
     r"step\(action\) gave a tuple of 5, expected a tsad\.sim\.Step; return tsad\.sim\.Step\("),
    ("tsad.sim.Step(self.seen(), score,", "tsad.sim.Step(self.seen()[:5], score,",
     r"its obs of step\(action\): expected 6 finite numbers, got shape \(5,\)"),
    ("tsad.sim.Step(self.seen(), score,", "tsad.sim.Step(self.seen() * float('nan'), score,",
     r"its obs of step\(action\): expected 6 finite numbers, got nan in element 0; find where"),
    ("tsad.sim.Step(self.seen(), score,", "tsad.sim.Step(self.seen(), 70 + score,",
     r"gave the score 7\d\.\d+, expected 0 to 1; divide by the largest"),
    ("tsad.sim.Step(self.seen(), score,", "tsad.sim.Step(self.seen(), float('nan'),",
     r"gave the score nan, expected 0 to 1"),
    ("self.position = self.position * 0.9", "self.speed = self.speed * 0.9",
     r"AttributeError: 'Robot' object has no attribute 'speed' \(.*robot\.py, line 16\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message", "jobs"),
    [*((*case, []) for case in STEPS), *((*STEPS[i], ["--jobs", "2"]) for i in (5, 10))],
)
def test_what_it_gives_is_checked(
    capsys: Any, old: str, new: str, message: str, jobs: list[str]
) -> None:
    write(old=old, new=new)
    code, _, err = run(capsys, *command("eval", "--seeds", "3", "--out", "r.json", *SHORT, *jobs))
    assert code == 1 and re.search(f"{message}.*; no episode was finished", err, re.S), err
    assert not list(Path().glob("r.json*"))  # nothing to go on with, nothing in the way


def test_a_failure_in_a_later_episode_keeps_the_others(capsys: Any) -> None:
    bad = "self.fails = seed % 10 == 2\n        self.position = np.random"
    write(old="self.position = np.random", new=bad)
    text = Path("robot.py").read_text()
    raises = "def step(self, action):\n        if self.fails: raise OSError('no motor')"
    Path("robot.py").write_text(text.replace("def step(self, action):", raises))
    line = command("eval", "--seeds", "5", "--out", "r.json", *SHORT)
    code, _, err = run(capsys, *line)
    said = (
        r"OSError: no motor \(.*robot\.py, line \d+\); 2 episodes are kept; the same command with"
    )
    assert code == 1 and re.search(said, err), err
    code, _, err = run(capsys, *command("collect", "--out", "c", "--lanes", "1", *SHORT))
    assert code == 1 and re.search(r"no motor .*; 2 episodes are kept; the same command goes", err)
    assert len(list(Path("c").glob("*.npz"))) == 2


@pytest.mark.parametrize("name", ["eval", "collect", "tune", "generate"])
def test_one_simulator_and_a_policy(capsys: Any, name: str) -> None:
    Path("s.json").write_text('[{"name": "a"}, {"name": "b", "sparsity": 0.5}]')
    own = "or your own with --simulator MODULE:FACTORY"
    for words, message in (
        (
            ["chess"],
            f"unknown simulator 'chess'; expected one of pusht, pusht_corners, pusht_pixels, {own}",
        ),
        ([], "SIMULATOR: expected "),
        (["pusht", "--simulator", "robot:make"], "--simulator: got 'robot:make' beside 'pusht'"),
        (["--simulator", "robot:make"], "--policy: expected a policy for the simulator 'robot:ma"),
    ):
        code, _, err = run(capsys, name, *words, *OUT[name])
        assert code == 2 and message in err, err


def test_in_python(tmp_path: Path) -> None:
    register_own("robot:make", tmp_path)
    assert isinstance(sim.make("robot:make").max_steps, int)
    with pytest.raises(SimulatorError, match="no module 'nothing'"):
        register_own("nothing:make", tmp_path)
    assert "nothing:make" not in sim.names()
    step = stepped(FakeWorldOfDoubles(), np.zeros(2))
    assert step.obs.dtype == np.float32 and type(step.score) is float and step.done is False
    with pytest.raises(SimulatorError, match="simulator 'fake': step"):
        list(sim.rollouts(FakePolicy(), [Gym()], [0]))


class FakeWorldOfDoubles(FakeWorld):
    def step(self, action: Any) -> sim.Step:
        return sim.Step(np.zeros(3), np.float32(0.5), np.bool_(False), np.bool_(False))


class Gym(FakeWorld):
    def step(self, action: Any) -> Any:
        return np.zeros(3), 0.0, False, False, {}
