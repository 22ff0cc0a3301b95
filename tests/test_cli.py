"""tsad/cli.py and tsad/commands: what the user sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import run
from fakes import FakePushT

import tsad
from tsad.commands import common
from tsad.sim import results

COMMANDS = [
    "demo",
    "eval",
    "collect",
    "plan",
    "tune",
    "bench",
    "show",
    "info",
    "fit",
    "certify",
    "convert",
    "generate",
    "train-policy",
    "train-pruner",
]


@pytest.fixture
def fake(monkeypatch):
    """`tsad.load` gives a small fake; returns the keyword arguments it was called with."""
    calls: list[dict] = []

    def load(source, **options):
        if source != "pusht":
            raise FileNotFoundError(f"source: got {source!r}, expected a bundled name or a path")
        if options["device"] != "cpu":
            raise ValueError(f"device: expected 'cpu', got {options['device']!r}")
        calls.append(options)
        return FakePushT(options["lanes"])

    monkeypatch.setattr(tsad, "load", load)
    return calls


@pytest.fixture
def plan_file(tmp_path):
    plan = FakePushT().plan
    path = tmp_path / "plan.npz"
    plan.save(path)
    return str(path)


# --- the command line as such


def test_version(capsys) -> None:
    assert run(capsys, "--version") == (0, f"tsad {tsad.__version__}\n", "")


def test_help_of_everything_has_examples(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert f"\n    {name} " in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0 and "examples:" in text and f"tsad {name}" in text
        assert all(len(line) <= 110 for line in text.splitlines())


def test_no_command_and_wrong_command(capsys) -> None:
    for argv in ([], ["evaluate"], ["eval", "pusht", "--seed", "x"]):
        code, out, err = run(capsys, *argv)
        assert code == 2 and out == "" and "usage: tsad" in err
    code, out, err = run(capsys, "eval")
    assert code == 2 and out == "" and "argument SIMULATOR: expected one of pusht" in err


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tsad", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tsad {tsad.__version__}\n"


def test_help_needs_no_optional_package() -> None:
    """The whole parser is built without any package of an extra."""
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'rich', 'PIL', 'gymnasium', 'gym_pusht', 'pymunk'):\n"
        "    sys.modules[name] = None\n"
        "from tsad.cli import build_parser; build_parser()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_extra_is_named(capsys, monkeypatch, fake) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    code, out, err = run(capsys, "eval", "pusht", "--seeds", "1")
    assert code == 1 and out == "" and "pip install 'tsad-policy[sim]'" in err


# --- errors: the argument, what came, what was expected


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["eval", "pushT"], ["argument SIMULATOR", "'pushT'", "pusht"]),
        (["eval", "pusht", "--policy", "nowhere"], ["argument --policy", "'nowhere'"]),
        (["eval", "pusht", "--sparsity", "1.5"], ["argument --sparsity", "'1.5'", "0 (dense)"]),
        (["eval", "pusht", "--sparsity", "nan"], ["argument --sparsity", "'nan'"]),
        (["eval", "pusht", "--sparsity", "0.9"], ["argument --sparsity", "0.9", "0.75", "4 steps"]),
        (["eval", "pusht", "--planner", "best"], ["argument --planner", "'best'", "uniform"]),
        (["eval", "pusht", "--plan", "no.npz"], ["argument --plan", "'no.npz'", "not a file"]),
        (["eval", "pusht", "--plan", "p", "--sparsity", "0.5"], ["argument --plan", "--sparsity"]),
        (["eval", "pusht", "--seeds", "0"], ["argument --seeds", "'0'", "at least 1"]),
        (["eval", "pusht", "--lanes", "two"], ["argument --lanes", "'two'", "at least 1"]),
        (["eval", "pusht", "--device", "tpu"], ["argument --device: ", "'tpu'"]),
        (["eval", "pusht", "--steps", "-4"], ["argument --steps", "'-4'"]),
        (["eval", "pusht", "--first-seed", "-1"], ["argument --first-seed", "'-1'"]),
        (["eval", "pusht", "--sampler", "heun"], ["argument --sampler", "heun", "ddim"]),
        (["eval", "pusht", "--resume"], ["argument --resume", "--out"]),
        (["eval", "pusht", "--out", "no/such/r.json"], ["argument --out", "no/such"]),
        (["eval", "pusht", "--out", "."], ["argument --out", "folder"]),
        (["eval", "pusht", "--baseline", "no.json"], ["argument --baseline", "no.json"]),
        (["show", "no.npz"], ["argument PLAN", "'no.npz'"]),
        (["show", "."], ["argument PLAN", "'.'"]),
        (["bench", "nowhere"], ["argument SRC", "'nowhere'"]),
        (["bench", "--sparsity", "0.5", "0.8"], ["argument --sparsity", "0.8", "0.75"]),
        (["info", "nowhere"], ["argument SRC", "'nowhere'"]),
        (["demo", "--sparsity", "x"], ["argument --sparsity", "'x'"]),
        (["demo", "--policy", "nowhere"], ["argument --policy", "'nowhere'"]),
        (["convert", "no.ckpt", "out"], ["argument CHECKPOINT", "'no.ckpt'"]),
    ],
)
def test_errors_name_the_argument(capsys, tmp_path, monkeypatch, fake, argv, parts) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert f"tsad {argv[0]}: error: " in err
    for part in parts:
        assert part in err.splitlines()[-1], err
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_broken_plan_files(capsys, tmp_path, fake, plan_file) -> None:
    for content in (b"", b"PK\x03\x04", b"hello"):
        (tmp_path / "bad.npz").write_bytes(content)
        code, _, err = run(capsys, "show", str(tmp_path / "bad.npz"))
        assert code == 2 and "argument PLAN" in err and "bad.npz" in err
    np.savez(tmp_path / "bad.npz", other=np.zeros(3))
    assert run(capsys, "show", str(tmp_path / "bad.npz"))[0] == 2


def test_failures_beyond_the_user_exit_1(capsys, monkeypatch, fake) -> None:
    def fail(*_, **__):
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(FakePushT, "__call__", fail)
    code, out, err = run(capsys, "eval", "pusht", "--seeds", "1")
    assert code == 1 and out == ""
    assert err.startswith("tsad eval: error: RuntimeError: the device fell off the bus (")
    assert "test_cli.py, line" in err and "nothing was kept; --out FILE keeps episodes" in err


@pytest.mark.skipif(os.name == "nt", reason="terminals")
@pytest.mark.parametrize("size", [(24, 100), (0, 0)])
def test_progress_bar_on_a_terminal_of_any_size(size) -> None:
    pytest.importorskip("rich")
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    code = (
        "from tsad.evaluation.progress import Progress\n"
        "with Progress(4, 'pusht', unit='episodes', done=1) as bar:\n"
        "    for _ in range(3): bar.update('score 0.5')\n"
    )
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    text = os.read(ours, 10000).decode()
    os.close(ours)
    assert "4/4" in text and "score 0.5" in text and "100%" in text


# --- eval


def episodes(document: dict) -> list[dict]:
    """Results without times."""
    return [
        {key: value for key, value in episode.items() if not key.startswith("chunk_ms")}
        for episode in document["episodes"]
    ]


def short_world(monkeypatch, steps: int = 24) -> None:
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", steps)


def evaluate(capsys, *argv: str) -> dict:
    code, out, err = run(capsys, "eval", "pusht", "--json", *argv)
    assert code == 0, err
    return json.loads(out)


def test_eval_json(capsys, monkeypatch, fake) -> None:
    pytest.importorskip("gym_pusht")
    short_world(monkeypatch)
    one = evaluate(capsys, "--seeds", "4", "--sparsity", "0.5", "--sampler", "ddim", "--steps", "4")
    assert fake[0] == {
        "lanes": 1,
        "device": "cpu",
        "precision": "auto",
        "threads": None,
        "sampler": "ddim",
        "num_inference_steps": 4,
        "timestep_spacing": None,
        "warm_start": None,
        "lead": None,
        "smoothing": None,
        "fitted": None,
        "reuse_images": None,
        "vision_precision": None,
    }
    assert [episode["seed"] for episode in one["episodes"]] == [100000 + i for i in range(4)]
    assert one["settings"]["sparsity"] == 0.5 and one["settings"]["planner"] == "uniform"
    assert len(one["settings"]["files_sha256"]["model.safetensors"]) == 64
    assert one["settings"]["packages"]["gym-pusht"]
    mean = np.mean([episode["score"] for episode in one["episodes"]])
    assert one["summary"]["score"]["mean"] == pytest.approx(mean)
    many = evaluate(capsys, "--seeds", "4", "--sparsity", "0.5", "--lanes", "3")
    assert episodes(many) == episodes(one) and many["settings"] == one["settings"]
    dense = evaluate(capsys, "--seeds", "4")
    assert dense["settings"]["planner"] == "dense" and episodes(dense) != episodes(one)


def test_eval_text(capsys, monkeypatch, fake) -> None:
    pytest.importorskip("gym_pusht")
    short_world(monkeypatch, 8)
    code, out, err = run(capsys, "eval", "pusht", "--seeds", "2", "--first-seed", "7")
    assert code == 0 and "seeds 7 to 8" in out and "score " in out and "95 % interval" in out
    assert "2 of 2 episodes" in err


def interrupt_after(monkeypatch, calls: int) -> None:
    """As Ctrl-C in the middle of a run."""
    original = FakePushT.__call__
    count = iter(range(10**6))

    def call(self, obs, *, lanes=None):
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(self, obs, lanes=lanes)

    monkeypatch.setattr(FakePushT, "__call__", call)


def test_eval_interrupted_and_resumed(capsys, tmp_path, monkeypatch, fake) -> None:
    pytest.importorskip("gym_pusht")
    short_world(monkeypatch)
    whole = evaluate(capsys, "--seeds", "6")
    out = str(tmp_path / "r.json")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        code, text, err = run(capsys, "eval", "pusht", "--seeds", "6", "--out", out)
    assert code == 130 and text == "" and "2 episodes are kept" in err and "--resume" in err
    assert os.listdir(tmp_path) == ["r.json.partial"]

    code, _, err = run(capsys, "eval", "pusht", "--seeds", "6", "--out", out)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    code, _, err = run(
        capsys, "eval", "pusht", "--seeds", "6", "--out", out, "--resume", "--sparsity", "0.5"
    )
    assert code == 2 and "sparsity: the file has 0.0, this run 0.5" in err

    resumed = evaluate(capsys, "--seeds", "6", "--out", out, "--resume", "--lanes", "2")
    assert episodes(resumed) == episodes(whole) and resumed["settings"] == whole["settings"]
    assert os.listdir(tmp_path) == ["r.json"]
    with open(out) as file:
        assert json.load(file) == resumed

    # Finished: refused without --resume, extended with it.
    code, _, err = run(capsys, "eval", "pusht", "--seeds", "6", "--out", out)
    assert code == 2 and "argument --out" in err and "exists" in err
    longer = evaluate(capsys, "--seeds", "8", "--out", out, "--resume")
    assert episodes(longer)[:6] == episodes(whole) and len(longer["episodes"]) == 8
    # Fewer seeds: nothing that was measured is thrown away.
    fewer = evaluate(capsys, "--seeds", "2", "--out", out, "--resume")
    assert fewer["summary"]["episodes"] == 2 and len(fewer["episodes"]) == 8


def test_eval_interrupted_without_out(capsys, monkeypatch, fake) -> None:
    pytest.importorskip("gym_pusht")
    interrupt_after(monkeypatch, 1)
    code, out, err = run(capsys, "eval", "pusht", "--seeds", "2")
    assert code == 130 and out == "" and "--out" in err


def test_eval_plan_and_baseline(capsys, tmp_path, monkeypatch, fake, plan_file) -> None:
    pytest.importorskip("gym_pusht")
    short_world(monkeypatch)
    dense = str(tmp_path / "dense.json")
    evaluate(capsys, "--seeds", "3", "--out", dense)
    planned = evaluate(capsys, "--seeds", "3", "--sparsity", "0.5", "--baseline", dense)
    assert planned["paired"]["pairs"] == 3
    code, _, err = run(
        capsys, "eval", "pusht", "--seeds", "3", "--first-seed", "5", "--baseline", dense
    )
    assert code == 2 and "argument --baseline" in err and "none of the seeds 5 to 7" in err
    fixed = evaluate(capsys, "--seeds", "1", "--plan", plan_file)
    assert fixed["settings"]["planner"] == "file" and len(fixed["settings"]["plan_sha256"]) == 64


def test_hashes_follow_the_files(tmp_path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"abc")
    (folder / "README.md").write_text("x")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = common.files_sha256(str(folder))
    assert before["model.safetensors"] == abc and list(before) == ["config.json", *list(before)[1:]]
    (folder / "model.safetensors").write_bytes(b"abd")
    after = common.files_sha256(str(folder))
    (change,) = results.differences({"files_sha256": before}, {"files_sha256": after})
    assert change.startswith(f"files_sha256, model.safetensors: the file has {abc!r}, this run ")
    assert common.files_sha256(str(folder / "model.safetensors")).keys() == {"checkpoint"}
    names = {"config.json", "model.safetensors", "pruner.safetensors"}
    assert common.files_sha256("pusht").keys() == names


# --- show, info, bench


def test_show(capsys, tmp_path) -> None:
    sources = np.full((25, 6), tsad.REUSE_STEP, np.uint8)
    sources[::10] = tsad.COMPUTE
    sources[3, 3] = tsad.REUSE_TYPE
    plan = tsad.Plan(sources, blocks=FakePushT.blocks, types=FakePushT.block_types)
    path = tmp_path / "plan.npz"
    plan.save(path)
    code, out, _ = run(capsys, "show", str(path))
    assert code == 0 and "\x1b" not in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("layer ")]
    assert [row[:3] for row in rows[:2]] == [["layer", "0", "self"], ["layer", "0", "cross"]]
    grid = np.array([["#^.<-".index(sign) for sign in row[3]] for row in rows]).T
    np.testing.assert_array_equal(grid, sources)
    assert "compute" in out and " 18 " in out and "12.0%" in out
    code, out, _ = run(capsys, "show", str(path), "--color", "always")
    assert "\x1b[38;5;" in out
    code, out, _ = run(capsys, "show", str(path), "--json")
    assert json.loads(out)["counts"]["compute"] == 18 and json.loads(out)["steps"] == 25


def test_show_folds_long_plans(tmp_path) -> None:
    from tsad.plot.text import render

    plan = tsad.Plan(np.zeros((95, 6), np.uint8), blocks=FakePushT.blocks)
    text = render(plan, width=60, color=False)
    assert max(map(len, text.splitlines()[2:])) <= 70 and text.count("#") == 95 * 6 + 1


def test_show_png(capsys, tmp_path, plan_file) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert run(capsys, "show", plan_file, "--png", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "show", plan_file, "--png", str(tmp_path / "no" / "x.png"))
    assert code == 2 and "argument --png" in err


def test_info(capsys, fake) -> None:
    code, out, _ = run(capsys, "info", "--json")
    build = json.loads(out)["build"]
    assert code == 0 and build["tsad"] == tsad.__version__ and "ref" in build["backends"]
    code, out, _ = run(capsys, "info", "pusht", "--json")
    policy = json.loads(out)["policy"]
    assert policy["mac_per_dense_chunk"] == 4 * 32
    assert policy["block_types"]["feed_forward"] == {"blocks": 2, "mac": 18}
    code, out, _ = run(capsys, "info", "pusht")
    assert code == 0 and policy["files_sha256"]["model.safetensors"] in out and "ddim" in out


def test_bench(capsys, fake) -> None:
    code, out, _ = run(capsys, "bench", "--json", "--chunks", "7", "--sparsity", "0.5", "0.75")
    document = json.loads(out)
    assert code == 0 and [r["sparsity"] for r in document["results"]] == [0.0, 0.5, 0.75]
    for result in document["results"]:
        assert result["chunks"] >= 7 and result["stages_ms"]["denoise"]["p50"] == 0.7
        call = result["call_ms"]
        assert 0 < call["p50"] <= call["p90"] <= call["max"] and call["p99"] is None  # of 10 calls
    code, out, _ = run(capsys, "bench", "--chunks", "5", "--sparsity", "0.9")
    assert code == 2  # it is more than this fake reaches
    code, out, _ = run(capsys, "bench", "--chunks", "5", "--sparsity", "0.5", "--lanes", "2")
    assert code == 0 and "denoise" in out and "2 lanes" in out


def test_bench_takes_what_few_steps_allow(capsys) -> None:
    """The default of 0.9, which nobody gave, is more than four steps can save."""
    few = ["bench", "--sampler", "ddim", "--chunks", "1", "--json"]
    for more, found in (
        (["--steps", "4"], [0, 0.75]),
        (["--steps", "1"], [0]),
        (["--steps", "4", "--warm-start", "2"], [0, 0.5]),
        (["--steps", "4", "--planner", "dense"], [0]),
    ):
        code, out, err = run(capsys, *few, *more)
        assert code == 0, err
        assert [row["sparsity"] for row in json.loads(out)["results"]] == found
    code, _, err = run(capsys, *few, "--steps", "4", "--sparsity", "0.9")
    assert code == 2 and "argument --sparsity: got 0.9" in err


def test_bench_of_a_settings_file(capsys, tmp_path) -> None:
    """Each row with its own sampler, precision, plan and executed actions."""
    path = tmp_path / "rows.json"
    rows = [
        {"name": "few", "sampler": "ddim", "steps": 4},
        {"name": "half", "sampler": "ddim", "steps": 4, "plan": "1010", "precision": "int16"},
        {"name": "own", "n_action_steps": 4},
    ]
    path.write_text(json.dumps(rows))
    options = ["bench", "--settings", str(path), "--steps", "3", "--chunks", "5"]
    code, out, err = run(capsys, *options, "--json")
    assert code == 0, err
    few, half, own = json.loads(out)["results"]
    assert [r["sampler"] for r in (few, half, own)] == ["ddim, 4 steps"] * 2 + ["ddpm, 3 steps"]
    assert [r["precision"] for r in (few, half, own)] == ["float32", "int16", "float32"]
    assert [r["passes"] for r in (few, half, own)] == [4, 2, 3]
    assert own["actions_per_second"] == pytest.approx(4 * own["chunks_per_second"])
    assert few["actions_per_second"] == pytest.approx(8 * few["chunks_per_second"])
    code, out, _ = run(capsys, *options)
    assert code == 0 and "ddim, 4 steps" in out and f"settings of {path}, 1 lane" in out
    for more, wrong in (
        (["--lanes", "2"], "argument --lanes: got 2"),
        (["--preset", "fast"], "argument --preset: not together with --settings"),
        (["--sparsity", "0.5"], "argument --sparsity: not together with --settings"),
    ):
        code, _, err = run(capsys, *options, *more)
        assert code == 2 and wrong in err
    path.write_text("[]")
    code, _, err = run(capsys, *options)
    assert code == 2 and "expected a list of objects" in err


def test_bench_at_a_rate(capsys, fake) -> None:
    options = ["bench", "--chunks", "10", "--sparsity", "0.5"]
    begin = time.monotonic()
    code, out, _ = run(capsys, *options, "--paced", "50")
    # dense and sparse, five rounds of two chunks each, and the first waits as well
    assert code == 0 and "called at 50 Hz" in out and time.monotonic() - begin > 20 * 0.02
    code, out, _ = run(capsys, *options, "--json", "--paced", "1000")
    assert code == 0 and json.loads(out)["paced_hz"] == 1000
    for wrong in ("0", "-1", "fast", "nan", "inf"):
        code, _, err = run(capsys, *options, "--paced", wrong)
        assert code == 2 and f"--paced: got '{wrong}', expected calls a second" in err


def test_bench_observations_are_in_range() -> None:
    from tsad.evaluation.timing import observations

    obs = observations(FakePushT(3), 4)
    assert obs.shape == (4, 3, 2, 20) and obs.dtype == np.float32
    assert obs.min() >= 0 and obs.max() <= 500 and obs.std() > 50


# --- convert


def test_convert(capsys, tmp_path) -> None:
    pytest.importorskip("dill")
    pytest.importorskip("omegaconf")
    import checkpoints

    source, out = tmp_path / "latest.ckpt", tmp_path / "policy"
    checkpoints.save(source, checkpoints.payload())
    code, text, _ = run(capsys, "convert", str(source), str(out), "--json")
    summary = json.loads(text)
    assert code == 0 and summary["weights"] == "ema" and (out / "config.json").is_file()
    code, text, _ = run(capsys, "info", str(out))
    assert code == 0 and summary["sha256"] in text

    code, _, err = run(capsys, "convert", str(source), str(out))
    assert code == 2 and "argument FOLDER" in err and "--overwrite" in err
    code, text, _ = run(
        capsys, "convert", str(source), str(out), "--overwrite", "--dtype", "float16"
    )
    assert code == 0 and "float16" in text and f"tsad info {out}" in text

    source.write_bytes(source.read_bytes()[:1000])
    code, _, err = run(capsys, "convert", str(source), str(tmp_path / "other"))
    assert code == 2 and "argument CHECKPOINT" in err and "latest.ckpt" in err
    assert not (tmp_path / "other").exists()


def test_convert_pruner_wiring(capsys, tmp_path, monkeypatch) -> None:
    import tsad.convert

    seen: list[tuple] = []

    def convert_pruner(*args, **options):
        seen.append((args, options))
        return {"parameters": 3}

    monkeypatch.setattr(tsad.convert, "convert_pruner", convert_pruner)
    source = tmp_path / "a.pt"
    source.write_bytes(b"")
    argv = ["convert", str(source), "p"]
    code, text, _ = run(capsys, *argv, "--pruner", "--heads", "4", "--json")
    assert code == 0 and json.loads(text) == {"parameters": 3}
    options = {"n_head": 4, "dtype": "float32", "overwrite": False}
    assert seen == [((str(source), "p"), options)]
    assert run(capsys, *argv, "--heads", "4")[0] == 2
    assert run(capsys, *argv, "--pruner", "--weights", "raw")[0] == 2


# --- the real policy, as a user runs it


def test_bundled_policy_end_to_end(capsys) -> None:
    pytest.importorskip("gym_pusht")
    options = ["--seeds", "3", "--sampler", "ddim", "--steps", "3"]
    one = evaluate(capsys, *options)
    assert episodes(evaluate(capsys, *options, "--lanes", "2", "--threads", "1")) == episodes(one)
    # An untrained policy hardly ever gets there; this one scores 0.83 on 50 seeds.
    assert one["summary"]["score"]["mean"] > 0.4
    sparse = evaluate(capsys, *options, "--sparsity", "0.5")
    assert sparse["settings"]["sparsity"] == 0.5 and episodes(sparse) != episodes(one)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_a_process_of_its_own(tmp_path) -> None:
    pytest.importorskip("gym_pusht")
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "tsad", "eval", "pusht", "--sampler", "ddim", "--steps", "2",
               "--seeds", "500", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "r.json.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == ""
    assert "Traceback" not in stderr and "--resume" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.json.partial"]
    header, *rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert header["settings"]["num_inference_steps"] == 2 and len(rows) >= 2
