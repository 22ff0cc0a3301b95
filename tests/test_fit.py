"""`tsad fit`: what is fitted runs in the core as the reference says, and lowers what is lost."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from command_line import run
from fit_cases import fit_stopped, last_error, slow_episodes
from policies import make_policy, noises, observations, save_policy

import tsad
from tsad import Plan, _core
from tsad.fitted import Fitted, coefficients_of, rows_of
from tsad.load import weights_sha256
from tsad.plan import plan_sha256
from tsad.presets import Preset, model_sha256, save_presets
from tsad.reference import LeadReference, ReferencePolicy, WarmReference
from tsad.samplers import make_sampler, tail
from tsad.setting import Setting, steady_sha256

KINDS = ("ddpm", "ddim", "dpmsolver++")


def made_up(name: str, kind: str, warm: int | None, seed: int = 0) -> Fitted:
    """Numbers near the sampler's own, for five steps of a case of `policies.make_policy`."""
    random = np.random.default_rng(seed)
    case = cases.config(name, prediction_type="sample", clip_sample=False)
    sampler = make_sampler(case["scheduler"], sampler=kind, num_inference_steps=5)
    own = coefficients_of(sampler if warm is None else tail(sampler, warm))
    shape = (case["network"]["horizon"], case["network"]["action_dim"])
    return Fitted(
        model_sha256="0" * 64, sampler=kind, num_inference_steps=5, timestep_spacing="leading",
        warm_start=warm, plan_sha256="0" * 64, n_action_steps=2,
        coefficients=rows_of(own * random.uniform(0.8, 1.2, own.shape)),
        gain=rows_of(random.uniform(-0.3, 0.3, shape) * (warm is not None)),
        shift=rows_of(random.uniform(-0.2, 0.2, shape)),
    )  # fmt: skip


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("kind", "warm"), [(k, w) for k in KINDS for w in (None, 3)])
@pytest.mark.parametrize("name", ["tiny", "tiny_long"])
def test_the_engine_is_its_specification(
    name: str, kind: str, warm: int | None, clip: bool
) -> None:
    fitted = made_up(name, kind, warm)
    options: dict[str, Any] = {"lanes": 2, "sampler": kind}
    policy, plain = (
        make_policy(name, steps=5, warm_start=warm, clip=clip, lead=0.2, fitted=each, **options)
        for each in (fitted, None)
    )
    assert policy.fitted is fitted and "fitted" in repr(policy) and plain.fitted is None
    case = cases.config(name, prediction_type="sample", clip_sample=clip)
    args = case, cases.random_tensors(case["network"], 0)
    options["num_inference_steps"] = 5
    if warm is None:
        inner: Any = ReferencePolicy(*args, **options, fitted=fitted)
    else:
        inner = WarmReference(*args, **options, warm_start=warm, fitted=fitted)
    twin = LeadReference(inner, lead=0.2)
    sources = cases.random_plan(
        np.random.default_rng(0), policy.num_inference_steps, policy.n_blocks, filled=False
    )
    policy.plan = plain.plan = Plan(sources, first=Plan(sources))
    for chunk, executed in enumerate([(0, 0), (2, 1), (3, 4)]):
        obs, noise = observations(policy, chunk), noises(policy, chunk)
        wanted = twin(obs, noise, executed, sources, first=sources)
        got = policy(obs, noise=noise, executed=list(executed))
        scale = max(np.abs(wanted).max(), 1)
        assert np.abs(got - wanted).max() <= 2e-4 * scale
        apart = np.abs(got - plain(obs, noise=noise, executed=list(executed))).max()
        assert (apart > 0.01) == (warm is None or chunk > 0)  # the cold chunk stays as it is


def test_a_chunk_is_what_numpy_makes_of_the_network_and_the_numbers() -> None:
    """Neither the engine's sampler nor the reference's: a loop over `predict_noise`."""
    fitted = made_up("tiny", "ddim", 3)
    policy = make_policy(steps=5, sampler="ddim", warm_start=3, fitted=fitted, clip=True)
    case = cases.config("tiny", prediction_type="sample", clip_sample=True)
    last = tail(make_sampler(case["scheduler"], sampler="ddim", num_inference_steps=5), 3)
    affine = policy.config["normalizer"]["action"]
    scale, offset = np.array(affine["scale"]), np.array(affine["offset"])
    noise, obs = noises(policy, 1), observations(policy, 1)
    cold = policy(observations(policy, 0), noise=noises(policy, 0), return_horizon=True)[0]
    got = policy(obs, noise=noise, executed=2, return_horizon=True)[0] * scale + offset
    T = len(cold)
    start = (cold * scale + offset)[np.minimum(np.arange(T) + 2, T - 1)]
    share = last.alphas_cumprod[0]
    x = np.sqrt(share) * start + np.sqrt(1 - share) * noise[-3, 0]
    before = np.zeros_like(x)
    for k, (a, b, c, d, f, g) in enumerate(fitted.coefficients):
        e = policy.predict_noise(np.float32(x[None]), k, obs)[0]
        x0 = np.clip(a * x + b * e, -1, 1)
        x, before = c * x0 + d * x + f * e + g * before, x0
    wanted = np.clip(x + np.array(fitted.gain) * (x - start) + fitted.shift, -1, 1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    assert (np.abs(wanted) < 1).mean() > 0.3


@pytest.mark.parametrize("backend", _core.backends())
def test_lanes_and_threads_make_no_difference(backend: str) -> None:
    options: dict[str, Any] = {"steps": 5, "sampler": "ddim", "warm_start": 3, "backend": backend}
    fitted = made_up("tiny", "ddim", 3)
    together, apart = (
        make_policy(lanes=3, threads=threads, fitted=fitted, **options) for threads in (2, 1)
    )
    for chunk in range(3):
        obs, noise = observations(together, chunk), noises(together, chunk)
        got = together(obs, noise=noise, executed=[1, 2, 3])
        for lane in (2, 0, 1):
            row = np.ascontiguousarray(noise[:, lane : lane + 1])
            alone = apart(obs[lane : lane + 1], noise=row, lanes=[lane], executed=lane + 1)
            np.testing.assert_array_equal(alone[0], got[lane])


# ---- the file


def file_of(folder: str, path: Path, **changes: Any) -> Fitted:
    """A file for the policy in a folder: DDIM-5, a warm start of 3, its first step computed."""
    policy = tsad.load(folder, sampler="ddim", num_inference_steps=5, warm_start=3)
    Setting(plan="100").apply(policy)
    sha256 = steady_sha256(policy)
    assert sha256 is not None
    own = {"model_sha256": weights_sha256(folder), "plan_sha256": sha256}
    fitted = Fitted(**{**vars(made_up("tiny", "ddim", 3)), **own, **changes})
    path.write_bytes(fitted.to_bytes())
    assert Fitted.read(path) == fitted
    return fitted


WARM: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 5, "warm_start": 3}


def test_what_was_fitted_for_another_policy_is_refused(tmp_path: Path) -> None:
    folder, path = save_policy(tmp_path / "p"), tmp_path / "fitted.json"
    fitted = file_of(folder, path)
    assert tsad.load(folder, fitted=path, **WARM).fitted == fitted
    other = save_policy(tmp_path / "other", seed=1)
    for source, changed, says in (
        (other, {}, "model_sha256 '.*', as this policy's is, got '.*'; load the policy"),
        (folder, {"sampler": "dpmsolver++"}, "sampler 'dpmsolver.*, got 'ddim'"),
        (folder, {"num_inference_steps": 6}, "num_inference_steps 6, .*got 5"),
        (folder, {"warm_start": 2}, "warm_start 2, .*got 3"),
        (folder, {"warm_start": None}, "warm_start None, .*got 3"),
        (folder, {"timestep_spacing": "trailing"}, "timestep_spacing 'trailing', .*got 'leading'"),
    ):
        with pytest.raises(ValueError, match=f"fitted: expected what was made for {says}"):
            tsad.load(source, fitted=path, **{**WARM, **changed})
    file_of(folder, path, gain=((0.0,),), shift=((0.0,),))
    with pytest.raises(ValueError, match=r"fitted: expected gain and shift of shape \(\d+, \d+\)"):
        tsad.load(folder, fitted=path, **WARM)
    for wrong in (3, [1]):
        with pytest.raises(TypeError, match="fitted: expected a file of tsad fit, got"):
            tsad.load(folder, fitted=wrong, **WARM)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="fitted: .*not a file; expected one that 'tsad f"):
        tsad.load(folder, fitted=tmp_path / "none", **WARM)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", "other", "format: expected one of"),
        ("format_version", 2, "format_version: expected 1"),
        ("coefficients", [[1.0] * 6], "coefficients: expected 3 rows, got 1"),
        ("coefficients", [[1.0] * 5] * 3, r"coefficients.0: expected a list of 6 numbers"),
        ("gain", [[1e300]], "expected a finite number"),
        ("shift", "x", "shift: expected rows of numbers"),
        ("shift", [], "shift: expected rows of numbers"),
        ("warm_start", 9, "warm_start: expected an integer from 1 to 5"),
        ("plan_sha256", "abc", "plan_sha256: expected 64 hexadecimal digits"),
        ("measured", [], "measured: expected a JSON object"),
        ("mine", 1, "unknown key 'mine'"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, key: str, value: Any, says: str) -> None:
    folder, path = save_policy(tmp_path / "p"), tmp_path / "fitted.json"
    file_of(folder, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"fitted: .*{says}"):
        tsad.load(folder, fitted=path, **WARM)


def test_the_core_refuses_what_is_no_correction() -> None:
    policy = make_policy("tiny")
    zeros = np.zeros((policy.horizon, policy.action_dim), np.float32)
    for given, says in (
        (3, r"correction: expected \(gain, shift\)"),
        ((zeros,), "correction"),
        ((zeros[:1], zeros), "gain: expected shape"),
        ((zeros, zeros[:, :1]), "shift: expected"),
        ((zeros + np.nan, zeros), "gain: expected numbers"),
        ((zeros, zeros + np.inf), "shift: expected numbers"),
        ((zeros + 1, zeros), "gain: expected zeros, as no chunk starts from the one before"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            _core.Policy(policy.model, correction=given)  # type: ignore[arg-type]


def test_a_preset_has_it_and_its_hash(tmp_path: Path) -> None:
    folder, path = tmp_path / "p", tmp_path / "fitted.json"
    save_policy(folder)
    fitted = file_of(str(folder), path)
    policy = tsad.load(folder, **WARM)
    Setting(plan="100").apply(policy)
    plan = policy.plan
    assert isinstance(plan, Plan)
    made = Preset("mine", model_sha256(folder), timestep_spacing="leading", fitted=fitted, **WARM)
    save_presets(folder, [(made, plan)])
    loaded = tsad.load(folder, preset="mine")
    assert loaded.fitted == fitted and plan_sha256(plan) == fitted.plan_sha256
    twin = tsad.load(folder, fitted=path, **WARM)
    twin.plan = plan
    setting = pickle.loads(pickle.dumps(Setting(**WARM, fitted=path, plan=plan).alone(twin)))
    sent = tsad.load(folder, **setting.options())  # as a worker does
    setting.apply(sent)
    others = [sent, copy.copy(loaded), *(pickle.loads(pickle.dumps(p)) for p in (loaded, twin))]
    assert setting.key(twin)["fitted_sha256"] == fitted.sha256
    for chunk in range(2):
        obs, noise = observations(twin, chunk), noises(twin, chunk)
        wanted = twin(obs, noise=noise)
        for each in (loaded, *others):
            np.testing.assert_array_equal(each(obs, noise=noise), wanted)
    with pytest.raises(ValueError, match="fitted: got .* but the preset 'mine' has"):
        tsad.load(folder, preset="mine", fitted=path)
    # the same with another plan, which it was not fitted for
    save_presets(folder, [(made, None)])
    with pytest.raises(ValueError, match="fitted: was made for another plan than this setting's"):
        tsad.load(folder, preset="mine")
    save_presets(folder, [(made, plan)])
    file = folder / "preset-mine-fitted.json"
    file.write_text(file.read_text().replace('"measured": {}', '"measured": {"a": 1}'))
    with pytest.raises(ValueError, match="expected the fitted of the preset 'mine', sha256"):
        tsad.load(folder, preset="mine")


# ---- the fit


@pytest.fixture
def data(tmp_path: Path) -> str:
    return slow_episodes(tmp_path)


FEW = ["--sampler", "ddim", "--steps", "4", "--spacing", "trailing", "--against", "12",
       "--threads", "1", "--json", "--lr", "0.05", "--draws", "4"]  # fmt: skip


def test_a_fit_lowers_what_a_plan_loses(capsys: Any, tmp_path: Path, data: str) -> None:
    """By the engine, on the chunks held out; and DIR has what `tsad eval` takes."""
    pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    folder, out = save_policy(tmp_path / "p"), tmp_path / "out"
    words = ["fit", folder, "--data", data, "--out", str(out), *FEW, "--plan", "1010"]
    code, text, err = run(capsys, *words, "--updates", "20")
    assert code == 0, err
    found = json.loads(text)
    before, after = found["mean_rms"]
    assert after < 0.9 * before
    rows = json.loads((out / "settings.json").read_text())
    options = {"sampler": "ddim", "num_inference_steps": 4, "timestep_spacing": "trailing"}
    many = tsad.load(folder, **{**options, "num_inference_steps": 12})
    for row, wanted in zip(rows, (before, after), strict=True):
        fitted = out / row["fitted"] if "fitted" in row else None
        policy = tsad.load(folder, fitted=fitted, **options)
        policy.plan = tsad.planners.from_steps(policy, row["plan"])
        assert last_error(policy, many, data) == pytest.approx(wanted, rel=1e-3)


def test_a_fit_goes_on_where_it_stopped(
    capsys: Any, tmp_path: Path, data: str, monkeypatch: Any
) -> None:
    pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    from tsad.training.running import load_state, save_state

    folder, files = save_policy(tmp_path / "p"), []
    for name in ("apart", "at once"):
        words = ["fit", folder, "--data", data, "--out", str(tmp_path / name), *FEW]
        words += ["--plan", "1010", "--updates", "4"]
        if name == "apart":
            err = fit_stopped(capsys, monkeypatch, words, 1)
            assert "go on with: the same command" in err
        code, _, err = run(capsys, *words)
        assert code == 0, err
        files.append(Fitted.read(tmp_path / name / "fitted.json"))
    assert files[0].coefficients == files[1].coefficients and files[0].shift == files[1].shift
    code, _, err = run(capsys, *words, "--seed", "1")
    assert code == 2 and "argument --out" in err and "seed: the file has 0, this run 1" in err
    path = tmp_path / "at once" / "training.pt"
    state = load_state(path.parent)
    del state["parameters"]  # as of a version that called them otherwise
    save_state(path, state)
    code, _, err = run(capsys, *words)
    assert code == 2 and "argument --out" in err and "holds a fit of an earlier version" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    words[words.index("--out") + 1] = str(tmp_path / "other")
    code, _, err = run(capsys, *words)
    assert code == 2 and "is not empty and holds no fit" in err


def test_a_warm_starts_bias_is_what_least_squares_say() -> None:
    pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    from tsad.training.fit import Bias

    random = np.random.default_rng(0)
    start, move = random.normal(size=(2, 50, 4, 2))
    right = start + 1.3 * move + [0.1, -0.2] + 0.1 * random.normal(size=move.shape)
    for terms in ("affine", "gain"):
        bias = Bias(start, start + move, right, terms)
        for t in range(4):
            rows = [np.append(m[t].T[:, None], np.eye(2) * (terms == "affine"), 1) for m in move]
            found = np.linalg.lstsq(
                np.concatenate(rows), (right - start - move)[:, t].ravel(), rcond=None
            )[0]
            wanted = np.concatenate([[bias.gain[t, 0]], bias.shift[t]])
            np.testing.assert_allclose(wanted, found * (1, *[terms == "affine"] * 2), atol=1e-9)
            assert bias.gain[t, 0] == bias.gain[t, 1]
    nothing = Bias(start, start + move, right, "none")
    np.testing.assert_array_equal(nothing(start, np.clip(right, -1, 1), 1.0), np.clip(right, -1, 1))


def test_a_warm_starts_fit(capsys: Any, tmp_path: Path, data: str) -> None:
    """Its numbers run, and what starts must be of is asked for."""
    pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    folder, out = save_policy(tmp_path / "p"), tmp_path / "out"
    words = ["fit", folder, "--out", str(out), *FEW, "--warm-start", "2", "--plan", "10"]
    code, text, err = run(capsys, *words, "--data", data, "--updates", "10")
    assert code == 0, err
    found = json.loads(text)
    assert found["mean_off_after"] < found["mean_off_before"]
    policy = tsad.load(
        folder, sampler="ddim", num_inference_steps=4, timestep_spacing="trailing", warm_start=2,
        fitted=out / "fitted.json",
    )  # fmt: skip
    assert policy.fitted is not None and np.any(policy.fitted.gain)
    single = tmp_path / "single.npz"
    np.savez(single, obs=np.load(data)["obs"])
    words[words.index(str(out))] = str(tmp_path / "other")
    code, _, err = run(capsys, *words, "--data", str(single))
    assert code == 2 and "argument --data: expected successive chunks" in err
    for more, says in (
        (["--terms", "x"], "argument --terms: expected one of affine, gain, none"),
        (["--val-episodes", "5"], "argument --val-episodes: got 5, expected 0 to 4"),
        (["--sampler", "ddpm"], "argument --against: ddpm draws noise at every step"),
        (["--draws", "1"], "argument --draws: expected at least 2"),
    ):
        code, _, err = run(capsys, *words, "--data", data, *more)
        assert code == 2 and says in err, err
