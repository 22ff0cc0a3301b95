"""Settings inside checkpoints: every value is the one that OmegaConf gives, or is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsad.checkpoint import CheckpointError
from tsad.convert import read_checkpoint
from tsad.convert.interpolation import calculate
from tsad.convert.pickle_machine import Global, Placeholder, read_pickle
from tsad.convert.settings import Settings

omegaconf = pytest.importorskip("omegaconf")
OmegaConf = omegaconf.OmegaConf


@pytest.fixture(autouse=True, scope="module")
def resolvers() -> Any:
    """As Diffusion Policy registers it."""
    OmegaConf.register_new_resolver("eval", eval, replace=True)
    OmegaConf.register_new_resolver("double", lambda x: 2 * x, replace=True)
    yield
    OmegaConf.clear_resolver("eval")
    OmegaConf.clear_resolver("double")


class Inert:
    """No names mean anything: every call becomes a record."""

    def call(self, ref: Global, args: tuple[Any, ...]) -> Any:
        return Placeholder(ref, args)

    def persistent(self, pid: Any) -> Any:
        raise ValueError


def read(cfg: Any) -> Settings:
    """Settings of a config as a checkpoint holds it, pickled and read back."""
    return Settings(read_pickle(io.BytesIO(pickle.dumps(cfg)), Inert(), "x"), "x.ckpt")


def both(cfg: Any) -> list[Settings]:
    """From OmegaConf's object, and from the plain dict of it."""
    return [read(cfg), read(OmegaConf.to_container(cfg))]


TREE: dict[str, Any] = {
    "a": {
        "b": 3,
        "list": [1, 2, {"z": 9}, "${.0}", "${..b}"],
        "same": "${.b}",
        "up": "${..top}",
        "name": "b",
        "chain": "${.same}",
        "deep": {"er": {"x": "${...b}", "y": "${a.deep.er.x}"}},
    },
    "top": 7,
    "yes": True,
    "nothing": None,
    "half": 0.5,
    "text": "word",
    "section": "${a}",
    "part": "${section.deep}",
    "far": "${part.er.y}",
    "other": {"relative": {"q": "${..q}"}, "q": 5},
    "moved": "${other.relative}",
    "1": "one",
    "missing": "???",
}
RESOLVED = [
    "${a[b]}",
    "${[a].b}",
    "${[a][b]}",
    "${a.list[0]}",
    "${a.list.0}",
    "${a.list[2].z}",
    "${a.list[-1]}",
    "${a.list[3]}",
    "${a.list[4]}",
    "${a.${a.name}}",
    "${a[${a.name}]}",
    "${a.list[${eval:'0 + 1'}]}",
    "${${text_is_a}.b}",
    "${ a.b }",
    "${.a.b}",
    "${a.chain}",
    "${a.up}",
    "${a.deep.er.x}",
    "${far}",
    "${section.b}",
    "${section.up}",
    "${part.er.x}",
    "${moved.q}",
    "${1}",
    "x${a.b}y${top}z",
    "${top}${top}",
    "${half} ${yes} ${nothing}",
    "\\${a.b}",
    "\\\\${a.b}",
    "x\\${a.b}${top}",
    "$ {a.b}",
    "${a.b}}",
    "${yes}",
    "${nothing}",
    "${half}",
    "a\\\\b",
    "${eval:'${a.b}+1'}",
    '${eval:"${a.b}*2"}',
    "${eval: ${a.b} + 1}",
    "${eval:'${a.b} if ${yes} else 0'}",
    "${eval: ${a.b} if ${yes} else ${top}}",
    "${eval:'${a.b} > 2 and not ${yes}'}",
    "${eval:'1 < ${a.b} <= 3 != 4'}",
    "${eval:'(${top} - 1) // 2 % 2 - -3'}",
    "${eval:'${top} / 2'}",
    "${eval:'None'}",
    "${eval:'min(${a.b}, ${top}, 5)'}",
    "${eval:'int(${half} * 9)'}",
    "${eval:'\\'${text}\\' == \\'word\\''}",
    "${eval:'${eval:'1 + 1'} + ${a.b}'}",
    "${eval:'0 or ${top}'}",
    "${eval:'${top} is None'}",
    "${eval:'round(${half} * 3)'}",
    "${eval:'1.5e3'}",
    "${oc.select:a.b}",
    "${oc.select:.top}",
    "${oc.select:nowhere,10}",
    "${oc.select:nowhere,'10'}",
    "${oc.select:nowhere,1.5}",
    "${oc.select:nowhere,true}",
    "${oc.select:nowhere,null}",
    "${oc.select:nowhere, a word }",
    "${oc.select:nowhere,${top}}",
    "${oc.select:'a.list[0]'}",
    "${oc.select:missing,3}",
    "${oc.select:a.name,3}",
]


@pytest.mark.parametrize("text", RESOLVED)
def test_values_are_those_of_omegaconf(text: str) -> None:
    cfg = OmegaConf.create(TREE | {"text_is_a": "a", "it": text, "in": {"side": text}})
    expected = cfg.it
    for found in both(cfg):
        value = found.get("it")
        assert value == expected and type(value) is type(expected)
        if text != "${.a.b}" and text != "${oc.select:.top}":
            assert found.get("in.side") == cfg["in"].side


@pytest.mark.filterwarnings("ignore")
def test_deprecated_keys() -> None:
    cfg = OmegaConf.create({"old": "${oc.deprecated:new}", "new": {"x": 3}})
    for found in both(cfg):
        assert found.get("old.x") == cfg.old.x == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("${nowhere}", "there is no 'nowhere'"),
        ("${a.b.c}", "there is no 'a.b.c'"),
        ("${a.list[9]}", "there is no"),
        ("${....x}", "leads out"),
        ("${missing}", r"'missing' is missing, \?\?\?"),
        ("${it}", "endless"),
        ("${it}${it}", "endless"),
        ("${section.${it}}", "endless"),
        ("${oc.env:HOME}", "resolver 'oc.env' depends on the machine"),
        ("${oc.env:HOME,5}", "oc.env"),
        ("${oc.create:{}}", ""),
        ("${now:%H}", "resolver 'now' is not known"),
        ("${double:4}", "resolver 'double' is not known"),
        ("${hydra:runtime.cwd}", "hydra"),
        ("x${a}", "a dict of .* inside a text"),
        ("${a['b']}", ""),
        ("${}", ""),
        ("${a.b", ""),
        ("${a b}", ""),
        ("${eval:}", "takes a text"),
        ("${eval:${a.b}}", "takes a text"),
        ("${eval:'__import__(\"os\").getpid()'}", "no arithmetic|in an expression"),
        ("${eval:'open(\"/tmp/x\")'}", "in an expression"),
        ("${eval:'().__class__'}", "Attribute in an expression"),
        ("${eval:'9**9**9**9'}", "in an expression"),
        ("${eval:'[0] * 10'}", "in an expression"),
        ("${eval:'\"a\" * 10'}", "no number"),
        ("${eval:'9999999999 * 9999999999'}", "a large one"),
        ("${eval:'1 / 0'}", "division"),
        ("${eval:'lambda: 0'}", "in an expression"),
        ("${eval:'x := 1'}", ""),
        ("${eval:'1 +'}", ""),
    ],
)
def test_what_cannot_be_told_is_refused_by_key(text: str, says: str) -> None:
    found = read(TREE | {"it": text, "in": {"side": "${it}"}})
    for key in ("it", "in.side"):
        with pytest.raises(CheckpointError, match=rf"x\.ckpt: cfg\.{key}: .*{says}"):
            found.get(key)
    assert found.get("top") == 7  # and others do not mind


def test_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(builtins, "eval", never)
    monkeypatch.setattr(builtins, "exec", never)
    for text in ("${eval:'1 + 2'}", "${eval:'int(3)'}"):
        assert read({"it": text}).get("it") == 3


def test_missing_values_are_as_if_not_there() -> None:
    found = read(TREE)
    assert found.get("missing", 5) == 5 and found.get("nowhere", 6) == 6
    assert found.get("missing.x", 7) == 7 and found.section("missing") == {}
    assert found.get("nothing", 8) is None


def test_objects_are_refused_only_where_they_are_needed() -> None:
    """They used to count as missing, so that a default took their place."""
    found = read({"path": Path("a"), "steps": {"n": 10**5000}, "top": 1, "it": "x${path}"})
    for key, says in (("path", r"pathlib\.\w*Path"), ("steps.n", "builtins.int"), ("it", "Path")):
        with pytest.raises(CheckpointError, match=rf"cfg\.{key}: .*{says}"):
            found.get(key)
    assert found.get("top") == 1


def test_a_section_of_larger_settings() -> None:
    """``cfg`` may be a part: OmegaConf pickles it with its parents, which references start from."""
    whole = OmegaConf.create({"n": 3, "run": {"train": {"x": "${n}", "y": "${..z}"}, "z": 4}})
    part = whole.run.train
    found = read(part)
    assert (found.get("x"), found.get("y")) == (part.x, part.y) == (3, 4)
    assert found.get("n") is None
    indirect = OmegaConf.create({"a": {"p": {"x": "${.q}", "q": 1}}, "b": "${a.p}"})
    assert read(indirect.b).get("x") == indirect.b.x == 1


NAMES = ("a", "b", "c")


def values(depth: int) -> st.SearchStrategy[Any]:
    dots = st.sampled_from(["", ".", "..", "..."])
    paths = st.lists(st.sampled_from([*NAMES, "0", "1"]), min_size=1, max_size=3).map(".".join)
    reference = st.builds(lambda d, p: f"${{{d}{p}}}", dots, paths)
    text = st.lists(st.one_of(reference, st.sampled_from(["x", "\\", "$", " "])), max_size=3)
    leaf = st.one_of(st.integers(0, 3), st.none(), st.booleans(), reference, text.map("".join))
    if depth == 0:
        return leaf
    inner = values(depth - 1)
    table = st.dictionaries(st.sampled_from(NAMES), inner, min_size=1)
    return st.one_of(leaf, table, table, st.lists(inner, min_size=1, max_size=2))


def leaves(value: Any, at: str = "") -> list[str]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [key for k, v in items for key in leaves(v, f"{at}.{k}" if at else str(k))]
    return [at]


@settings(max_examples=400, deadline=None)
@given(tree=st.dictionaries(st.sampled_from(NAMES), values(2), min_size=2))
def test_random_settings_are_those_of_omegaconf(tree: dict[str, Any]) -> None:
    """Where OmegaConf has a value, it is the same; where it has none, there is an error. There is
    one for a section inside a text too, of which OmegaConf makes Python's notation."""
    try:
        cfg = OmegaConf.create(tree)
    except Exception:  # not of its grammar
        return
    found = read(cfg)
    for key in leaves(tree):
        try:
            expected = OmegaConf.select(cfg, key, throw_on_resolution_failure=True)
        except (omegaconf.errors.OmegaConfBaseException, RecursionError):
            with pytest.raises(CheckpointError):
                found.get(key)
            continue
        if isinstance(expected, omegaconf.Container):
            assert isinstance(found.get(key), dict | list)
            continue
        try:
            value = found.get(key)
        except CheckpointError as error:
            assert "inside a text" in str(error) and set("{[") & set(expected)
            continue
        assert value == expected and type(value) is type(expected), key


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="0123456789.+-*/%()<>=!andornotifels ,None'", max_size=30))
def test_arithmetic_is_that_of_python(text: str) -> None:
    try:
        value = calculate(text)
    except ValueError:
        return
    assert value == eval(text.strip())  # Python's value of an expression that was understood


# --- in a whole checkpoint


def scheduler_elsewhere(config: dict[str, Any], where: str) -> dict[str, Any]:
    scheduler = config["policy"]["noise_scheduler"] | {"num_train_timesteps": "${.steps_of_it}"}
    scheduler["steps_of_it"] = 50
    config |= {"scheduler": scheduler, "schedulers": [scheduler, {"ddpm": scheduler}]}
    config |= {"which": "ddpm"}
    config["policy"] |= {"noise_scheduler": where, "num_inference_steps": 20}
    return config


@pytest.mark.parametrize(
    "where",
    [
        "${scheduler}",
        "${..scheduler}",
        "${schedulers[0]}",
        "${schedulers.1.ddpm}",
        "${schedulers[1].${which}}",
        "${schedulers[-1][${which}]}",
        "${oc.select:scheduler}",
    ],
)
def test_references_to_the_scheduler(tmp_path: Path, where: str) -> None:
    config = scheduler_elsewhere(checkpoints.lowdim_config(), where)
    del config["logging"]
    for key in ("scheduler", "schedulers"):
        parts = [config[key]] if key == "scheduler" else [config[key][0], config[key][1]["ddpm"]]
        for part in parts:
            part["num_train_timesteps"] = 50
            part.pop("steps_of_it", None)
            part["beta_end"] = "${beta}"
    config["beta"] = 0.03
    source = checkpoints.save(tmp_path / "x.ckpt", checkpoints.payload(config))
    found = read_checkpoint(source).config.scheduler
    cfg = OmegaConf.create(config)
    expected = OmegaConf.to_container(cfg.policy.noise_scheduler, resolve=True)
    assert expected["beta_end"] == 0.03
    for key in ("num_train_timesteps", "beta_schedule", "beta_end", "clip_sample"):
        assert getattr(found, key) == expected[key]
    assert found.num_inference_steps == 20


def test_references_to_the_policy_and_its_network(tmp_path: Path) -> None:
    config = checkpoints.lowdim_config()
    config["nets"] = {"transformer": config["policy"].pop("model")}
    config["nets"]["transformer"]["n_head"] = "${..heads}"
    config["nets"]["heads"] = checkpoints.NETWORK["n_head"]
    config["policies"] = {"lowdim": config.pop("policy")}
    config["policies"]["lowdim"]["model"] = "${nets.transformer}"
    config["nets"]["transformer"].pop("output_dim")
    config["policy"] = "${policies.lowdim}"
    source = checkpoints.save(tmp_path / "x.ckpt", checkpoints.payload(config))
    assert read_checkpoint(source).config.network.to_dict() == checkpoints.NETWORK


def test_what_is_not_needed_need_not_be_resolved(tmp_path: Path) -> None:
    config = checkpoints.hybrid_config()
    config["policy"] |= {"crop_shape": "${oc.env:CROP}", "eval_fixed_crop": "${double:3}"}
    config["task"]["name"] = "${now:%H}"
    source = checkpoints.save(tmp_path / "x.ckpt", checkpoints.payload(config, hybrid=True))
    assert read_checkpoint(source).config.provenance["task"] == ""
    config["policy"]["mystery"] = "${double:3}"
    source = checkpoints.save(tmp_path / "x.ckpt", checkpoints.payload(config, hybrid=True))
    with pytest.raises(CheckpointError, match=r"cfg\.policy\.mystery: .*double"):
        read_checkpoint(source)


def test_numpy_numbers_in_plain_settings(tmp_path: Path) -> None:
    """A plain dict may hold them; they used to count as missing, and 100 steps were taken."""
    import numpy as np

    config = checkpoints.lowdim_config()
    config["policy"] |= {"num_inference_steps": np.int64(16), "pred_action_steps_only": np.False_}
    config["policy"]["noise_scheduler"]["beta_end"] = np.float64(0.03)
    for protocol in (2, 5):
        value = checkpoints.payload() | {"cfg": config}
        source = checkpoints.save(tmp_path / "x.ckpt", value, pickle_protocol=protocol)
        scheduler = read_checkpoint(source).config.scheduler
        assert (scheduler.num_inference_steps, scheduler.beta_end) == (16, 0.03)


def test_structured_settings(tmp_path: Path) -> None:
    """Settings made of dataclasses, whose classes are not here."""
    import dataclasses

    fields = {"n": 3, "name": "x", "part": None, "later": "${n}"}
    kind = dataclasses.make_dataclass("Config", [(k, Any, v) for k, v in fields.items()])
    cfg = OmegaConf.merge(OmegaConf.structured(kind), {"part": {"x": [1, "${name}"]}})
    found = read_pickle(io.BytesIO(_dill().dumps(cfg)), Inert(), "x")
    settings_ = Settings(found, "x.ckpt")
    assert settings_.get("later") == cfg.later == 3
    assert settings_.get("part.x.1") == cfg.part.x[1] == "x"


def _dill() -> Any:
    return pytest.importorskip("dill")
