"""A newcomer's mistakes on every command, also on those to come: each answer names the argument,
what came and what was expected, exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from policies import save_policy

import tsad
from tsad import cli
from tsad.checkpoint import write_folder
from tsad.commands.parser import Parser
from tsad.fitted import Fitted, coefficients_of, rows_of
from tsad.guard import Bound
from tsad.load import read_policy, weights_sha256
from tsad.samplers import make_sampler
from tsad.setting import steady_sha256
from tsad.sim.rollout import Episode

FEW = "--sampler ddim --steps 4 --threads 1"
# Uses of every command, in whose words mistakes are made. OUT is written, the others are read.
USES = {
    "demo": ["--policy POLICY --out OUT --seeds 1"],
    "eval": [
        "pusht --seeds 1 --policy POLICY --plan PLAN --baseline RESULTS --fitted FITTED"
        f" --guard GUARD --out OUT {FEW}",
        "pusht --policy POLICY --seeds 2 --settings SETTINGS --observations RECORDED --out OUT",
    ],
    "collect": [f"pusht --policy POLICY --episodes 1 --out OUT {FEW}"],
    "plan measure": [f"POLICY --data RECORDED --out OUT {FEW}"],
    "plan make": [f"effects POLICY --effects EFFECTS --sparsity 0.5 --out OUT {FEW}"],
    "plan search": [f"POLICY --data RECORDED --start PLAN --minutes 0 --out OUT {FEW}"],
    "plan import": [f"MASK POLICY --out OUT {FEW}"],
    "tune": [
        "--policy POLICY --observations RECORDED --settings SETTINGS --draws 2 --out OUT",
        "pusht --policy SMALL --settings SETTINGS --data SMALL_RECORDED --seeds 2 --rounds 1"
        " --out OUT",
    ],
    "bench": [f"POLICY {FEW}", "POLICY --settings SETTINGS --threads 1"],
    "show": ["PLAN --png OUT"],
    "info": ["POLICY"],
    "certify": [
        "SMALL --data SMALL_RECORDED --out OUT --rounds 1 --chunks 1 --draws 2 --threads 1"
    ],
    "convert": ["CHECKPOINT OUT"],
    "generate": ["pusht --policy POLICY --seeds 0:2 --out OUT.npz"],
    "train-policy": [
        "DATA --init POLICY --out OUT --steps 1 --device cpu",
        "DATA --keypoints KEYPOINTS --out OUT --steps 1 --device cpu",
    ],
    "fit": [
        "SMALL --data SMALL_RECORDED --out OUT --updates 1 --chunks 2 --draws 2 --against 4"
        " --plan PLAN --threads 1"
    ],
    "train-pruner": [
        "SMALL --data SMALL_RECORDED --out OUT --steps 1 --device cpu --chunks 1",
        "SMALL --data SMALL_RECORDED --effects SMALL_EFFECTS --plans PLAN --out OUT --steps 1"
        " --device cpu",
    ],
}
READ = ("FILE", "DIR", "SRC", "POLICY", "PLAN", "CHECKPOINT", "DATA")  # metavars of what is read
WRITTEN = {"out", "png"}
ANY = {"--snr-power", "--shares"}  # options that take any finite number


def leaves(parser: Parser, name: str = "") -> Iterator[tuple[str, Parser]]:
    """Every command that does something, by its words."""
    if parser._subparsers is None:
        yield name, parser
        return
    (actions,) = parser._subparsers._group_actions
    for word, inner in (actions.choices or {}).items():  # type: ignore[union-attr]
        yield from leaves(inner, f"{name} {word}".strip())


LEAVES = dict(leaves(cli.build_parser()))
OPTIONS = [
    (name, action)
    for name, parser in LEAVES.items()
    for action in parser._actions
    if action.option_strings and action.dest != "help"
]


def last(text: str) -> str:
    return text.splitlines()[-1]


def title(action: Any) -> str:
    """How errors call an argument."""
    return str(action.option_strings[0] if action.option_strings else action.metavar)


@pytest.fixture(scope="module")
def material(tmp_path_factory: Any) -> dict[str, str]:
    """What the commands read."""
    for package in ("gym_pusht", "torch", "dill", "omegaconf"):
        pytest.importorskip(package)
    import checkpoints

    from tsad.sim.pusht import PushT

    folder: Path = tmp_path_factory.mktemp("material")
    names = ("RECORDED", "EFFECTS", "CHECKPOINT", "SMALL")
    names = (*names, "SMALL_RECORDED", "SMALL_EFFECTS")
    files = {name: str(folder / name.lower()) for name in names}
    config, tensors, _ = read_policy("pusht")
    few = replace(config.scheduler, type="ddim", num_inference_steps=4)
    write_folder(Path(files["SMALL"]), replace(config, scheduler=few, pruner=None), tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PushT, "max_steps", 16)
        command = f"collect pusht --out {files['RECORDED']} --episodes 2 {FEW}"
        assert cli.main(command.split()) == 0
        command = f"collect pusht --out {files['SMALL_RECORDED']} --policy {files['SMALL']}"
        assert cli.main([*command.split(), "--episodes", "2", "--threads", "1"]) == 0
    command = f"plan measure pusht --data {files['RECORDED']} --out {files['EFFECTS']} --chunks 2"
    assert cli.main([*command.split(), *FEW.split()]) == 0
    command = f"plan measure {files['SMALL']} --data {files['SMALL_RECORDED']} --chunks 2"
    assert cli.main([*command.split(), "--out", files["SMALL_EFFECTS"], "--threads", "1"]) == 0
    checkpoints.save(folder / "checkpoint", checkpoints.payload())
    policy = tsad.load("pusht", sampler="ddim", num_inference_steps=4)
    plan = tsad.planners.uniform(policy, 2)
    plan.save(folder / "plan.npz")
    config, shape = policy.config["scheduler"], (policy.horizon, policy.action_dim)
    policy.plan = plan
    fitted = Fitted(
        model_sha256=weights_sha256("pusht"),
        sampler="ddim",
        num_inference_steps=4,
        timestep_spacing=config["timestep_spacing"],
        warm_start=None,
        plan_sha256=str(steady_sha256(policy)),
        n_action_steps=policy.n_action_steps,
        coefficients=rows_of(coefficients_of(make_sampler(config))),
        gain=rows_of(np.zeros(shape)),
        shift=rows_of(np.zeros(shape)),
    )
    (folder / "fitted").write_bytes(fitted.to_bytes())
    bound = Bound(np.zeros((45, 40)), np.eye(40), np.array(1.0))
    (folder / "guard").write_bytes(bound.to_bytes())
    (folder / "mask").write_text("1010")
    episode = asdict(Episode(100_000, 0.5, False, 8, 1, 1.0, 1.0))
    results = {"format": "tsad-eval", "format_version": 1, "settings": {}, "episodes": [episode]}
    (folder / "results").write_text(json.dumps(results))
    (folder / "settings").write_text('[{"name": "a", "sampler": "ddim", "steps": 4}]')
    rng, ends = np.random.default_rng(0), np.arange(20, 201, 20)
    state, action = (rng.uniform(0, 500, (200, n)).astype(np.float32) for n in (5, 2))
    np.savez(folder / "data.npz", state=state, action=action, episode_ends=ends)
    (folder / "keypoints").write_text('{"local_keypoints_block_frame_px": [[0, 0]]}')
    names = ("MASK", "RESULTS", "SETTINGS", "FITTED", "GUARD")
    files |= {name: str(folder / name.lower()) for name in names}
    files |= {"PLAN": str(folder / "plan.npz"), "DATA": str(folder / "data.npz")}
    return files | {"POLICY": "pusht", "KEYPOINTS": str(folder / "keypoints")}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty folder to run in; what is wrong lies in another."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ---- the words


def test_every_command_has_a_use_here() -> None:
    assert set(USES) == set(LEAVES)
    for name, parser in LEAVES.items():
        used = set()
        for use in USES[name]:
            found = vars(cli.build_parser().parse_args([*name.split(), *use.split()]))
            values = {key: v if isinstance(v, list) else [v] for key, v in found.items()}
            used |= {key for key, v in values.items() if v and str(v[0]).isupper()}
        reads = {action.dest for action in parser._actions if action.metavar in READ}
        assert reads - WRITTEN <= used, name


@pytest.mark.parametrize("name", LEAVES)
def test_help(capsys: Any, name: str) -> None:
    code, out, err = run(capsys, *name.split(), "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: tsad {name} ")
    assert "examples:" in out and f"  tsad {name}" in out
    assert all(len(line) <= 110 and line.isascii() for line in out.splitlines())


@pytest.mark.parametrize("name", LEAVES)
def test_nothing_given(capsys: Any, name: str) -> None:
    required = [title(a) for a in LEAVES[name]._actions if a.required]
    if not required:
        pytest.skip("it does something")
    code, out, err = run(capsys, *name.split())
    assert code == 2 and out == "" and err.startswith(f"usage: tsad {name} ")
    assert last(err).startswith(f"tsad {name}: error: missing {', '.join(required)} ("), err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("evl pusht", "eval"),
        ("train_policy", "train-policy"),
        ("plan serch pusht", "search"),
        ("plan improt", "import"),
        ("eval pusht --sampler dimm", "ddim"),
        ("plan make efects pusht", "effects"),
    ],
)
def test_mistyped_words(capsys: Any, words: str, meant: str) -> None:
    code, out, err = run(capsys, *words.split())
    assert code == 2 and out == "" and "expected one of " in err
    assert last(err).endswith(f"did you mean {meant}?"), err


def test_options_before_the_command(capsys: Any) -> None:
    code, _, err = run(capsys, "--sparsity", "0.5", "eval", "pusht")
    assert (
        code == 2 and last(err) == "tsad: error: unknown option --sparsity (options follow COMMAND)"
    )


@pytest.mark.parametrize(("name", "action"), OPTIONS)
def test_mistyped_options(capsys: Any, name: str, action: Any) -> None:
    option, known_options = action.option_strings[0], LEAVES[name]._option_string_actions
    for typed in (option[:-2] + option[:-3:-1], option[1:] + "z", option + option[-1] + "=3"):
        if any(known.startswith(typed.partition("=")[0]) for known in known_options):
            continue  # none at all, or short for another
        code, out, err = run(capsys, *name.split(), typed, "3")
        assert code == 2 and out == "" and err.startswith(f"usage: tsad {name} ")
        said = last(err)
        assert said.startswith(f"tsad {name}: error: unknown option {typed.removesuffix('=3')}")
        assert said.endswith(f"; did you mean {option}? (tsad {name} --help lists all)"), said


@pytest.mark.parametrize("name", LEAVES)
def test_too_many_words(capsys: Any, name: str) -> None:
    if any(action.nargs == "+" and not action.option_strings for action in LEAVES[name]._actions):
        pytest.skip("it takes any number")
    use = USES[name][0].split()
    code, out, err = run(capsys, *name.split(), *use, "more", "more")  # one may be SIMULATOR
    assert code == 2 and err.startswith(f"usage: tsad {name} ")
    assert "unexpected argument 'more'" in last(err)


# ---- the values


class ReachedError(RuntimeError):
    """All values were taken."""


@pytest.mark.parametrize(("name", "action"), OPTIONS)
def test_wrong_values(
    capsys: Any, monkeypatch: Any, here: Path, material: dict[str, str], name: str, action: Any
) -> None:
    pytest.importorskip("torch")

    def reached(*_: Any, **__: Any) -> Any:
        raise ReachedError("all values were taken")

    from tsad.training import train

    monkeypatch.setattr(tsad, "load", reached)
    monkeypatch.setattr(train, "Trainer", reached)
    option = action.option_strings[0]
    wrong: tuple[str, ...] = ()
    if action.choices is not None:
        wrong = ("banana", "")
    elif action.type not in (None, str):
        wrong = ("banana", "", "nan", "-1", "inf", "1e99", "9" * 40)
    words = [material.get(word, word) for word in USES[name][0].split()]
    for value in wrong:
        code, out, err = run(capsys, *name.split(), *words, f"{option}={value}")
        if code == 1 and (value == "9" * 40 or (value in ("-1", "1e99") and option in ANY)):
            assert "all values were taken" in err
            continue
        assert code == 2 and out == "" and list(here.iterdir()) == [], (value, err)
        said = last(err)
        assert said.startswith(f"tsad {name}: error: argument {option}: "), said
        assert "expected" in said and (value in said or str(float(value)) in said), said


# ---- the files


def wrong_files(folder: Path, token: str) -> dict[str, Path]:
    """What may lie where something else should."""
    empty, noise = folder / "empty.npz", folder / "noise.json"
    empty.write_bytes(b"")
    noise.write_bytes(np.random.default_rng(0).bytes(1000))
    (folder / "nothing").mkdir()
    (folder / "text.json").write_text('{"a": [1]}\n')
    (folder / "array.npz").write_bytes(b"")
    np.savez(folder / "array.npz", a=np.zeros(3))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"format": ')
    names = ("missing", "nothing", "broken", *(path.name for path in (empty, noise)))
    return {name: folder / name for name in (*names, "text.json", "array.npz")}


FILES = [
    (name, use, token)
    for name, uses in USES.items()
    for use in uses
    for token in use.split()
    if token.isupper() and not token.startswith("OUT")
]


@pytest.mark.parametrize(("name", "use", "token"), FILES)
def test_wrong_files(
    capsys: Any,
    monkeypatch: Any,
    tmp_path: Path,
    here: Path,
    material: dict[str, str],
    name: str,
    use: str,
    token: str,
) -> None:
    pytest.importorskip("torch")
    action = _action(name, use, token)
    for kind, path in wrong_files(tmp_path, token).items():
        words = [str(path) if word == token else material.get(word, word) for word in use.split()]
        code, out, err = run(capsys, *name.split(), *words)
        assert code == 2 and out == "", (kind, err)
        said = last(err)
        assert said.startswith(f"tsad {name}: error: argument {title(action)}: "), (kind, said)
        assert kind in said and len(said) > len(str(path)) + 60, (kind, said)
        assert "[Errno" not in said, said
        assert list(here.iterdir()) == [], kind


def _action(name: str, use: str, token: str) -> Any:
    """The argument of a command that a word of its use is the value of."""
    found = vars(cli.build_parser().parse_args([*name.split(), *use.split()]))
    (action,) = (a for a in LEAVES[name]._actions if found.get(a.dest) in (token, [token]))
    return action


def test_a_policy_of_another_task(
    capsys: Any, tmp_path: Path, here: Path, material: dict[str, str]
) -> None:
    other = save_policy(tmp_path / "other")
    for name, uses in USES.items():
        for use in uses:
            if "POLICY" not in use.split() or not ({"pusht", "PLAN"} & set(use.split())):
                continue
            words = [other if w == "POLICY" else material.get(w, w) for w in use.split()]
            code, out, err = run(capsys, *name.split(), *words)
            assert code == 2 and out == "" and list(here.iterdir()) == [], (name, err)
            assert "expected" in last(err) or "load a policy trained for this task" in last(err)


@pytest.mark.parametrize("out", ["a folder/o u t", "\u00fc\udcff/\u00f6\udcff"])
@pytest.mark.parametrize(("name", "use"), [(n, use) for n, uses in USES.items() for use in uses])
def test_every_use_works(
    capsys: Any, monkeypatch: Any, material: dict[str, str], name: str, use: str, out: str
) -> None:
    """And again, or says why not; in any folder, on a terminal that knows ASCII alone."""
    from tsad.sim.pusht import PushT

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(PushT, "max_steps", 16)
    Path(out).parent.mkdir()
    suffix = ".png" if name == "show" else ""
    words = [material.get(word, word).replace("OUT", out) for word in use.split()]
    words = [word + suffix if word == out else word for word in words]
    code, printed, err = run(capsys, *name.split(), *words)
    assert code == 0, err
    for text in (printed, err):
        assert text.translate({ord("\u00fc"): None, ord("\u00f6"): None}).isascii(), text
    code, _, err = run(capsys, *name.split(), *words)
    assert code == 0 or (code == 2 and ("exists" in err or "is new or empty" in err)), err


def test_home_folders(
    capsys: Any, monkeypatch: Any, here: Path, tmp_path: Path, material: dict[str, str]
) -> None:
    """Which shells put in for ~ in some places and not in others."""
    monkeypatch.setenv("HOME", str(tmp_path))
    command = "plan make uniform pusht --sampler ddim --steps 4 --sparsity 0.5"
    code, _, err = run(capsys, *command.split(), "--out=~/mine.npz")
    assert code == 0 and (tmp_path / "mine.npz").is_file() and list(here.iterdir()) == [], err
    assert run(capsys, "show", "~/mine.npz")[0] == 0


@pytest.mark.parametrize("typed", ["pust", "PushT", "push-t", "Pusht"])
def test_mistyped_names(capsys: Any, typed: str) -> None:
    for words in (("info",), ("bench",), ("eval", "pusht", "--policy"), ("demo", "--policy")):
        code, _, err = run(capsys, *words, typed)
        assert code == 2 and last(err).endswith("where nothing is; did you mean 'pusht'?"), err
    for words in ("eval", "collect --out x", "tune --out x", "generate --out x.npz --seeds 1:2"):
        code, _, err = run(capsys, *words.split(), typed)
        assert code == 2 and last(err).endswith("; did you mean pusht?"), err


def test_a_policy_in_place_of_the_simulator(capsys: Any, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    code, _, err = run(capsys, "eval", policy)
    assert code == 2 and last(err).endswith(f"; a policy is given by --policy {policy}"), err


def test_a_repository_of_a_hub(capsys: Any) -> None:
    for name in ("lerobot/diffusion_pusht", "https://huggingface.co/lerobot/diffusion_pusht"):
        code, _, err = run(capsys, "info", name)
        assert code == 2 and "where nothing is; check the path; nothing is downloaded" in err


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:99"])
def test_a_device_that_is_not_here(
    capsys: Any, here: Path, material: dict[str, str], device: str
) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is")
    for words in (
        ("train-policy", material["DATA"], "--out", "x", "--steps", "1"),
        ("eval", "pusht"),
    ):
        code, _, err = run(capsys, *words, "--device", device)
        assert code == 2 and "argument --device: " in last(err) and device in last(err), err
        assert "expected" in err and list(here.iterdir()) == []


def test_sizes_of_a_network(capsys: Any, here: Path, material: dict[str, str]) -> None:
    for option, value in (("--n-emb", "33"), ("--n-head", "7")):
        command = ["train-policy", material["DATA"], "--out", "x", "--steps", "1"]
        code, _, err = run(capsys, *command, option, value)
        assert code == 2 and "argument --n-" in last(err) and "divisible" in err, err
    code, _, err = run(capsys, "train-policy", material["DATA"], "--out", "x")
    assert code == 2 and "argument --minutes, --steps: expected one of them" in err
    assert list(here.iterdir()) == []


def test_help_of_the_newcomers_first_words(capsys: Any) -> None:
    for words in ([], ["help"], ["-v"], ["--helpp"]):
        code, out, err = run(capsys, *words)
        assert code == 2 and out == "" and err.startswith("usage: tsad [-h]")
