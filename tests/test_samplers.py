"""The coefficient tables against the installed diffusers, check values, and misuse."""

from __future__ import annotations

import itertools
from typing import Any

import cases
import numpy as np
import pytest

from tsad.samplers import COLUMNS, NOISE, Sampler, advance, make_sampler, tail

torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")

import torch_oracle  # noqa: E402

STEPS = (1, 2, 3, 7, 10, 16, 40, 50, 100)
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")


def scheduler(**keys: Any) -> dict[str, Any]:
    return cases.SCHEDULER | keys


def theirs(config: dict[str, Any]) -> Any:
    return torch_oracle.diffusers_scheduler(config)


def run_theirs(
    config: dict[str, Any], e: Any, noise: Any, *, double: bool, coefficients: Any = None
) -> Any:
    """In float64 or float32, with coefficients computed in the same type or another."""
    dtype = torch.float64 if double else torch.float32
    outputs = torch.tensor(e, dtype=dtype)
    double = double if coefficients is None else coefficients == np.float64
    solver = torch_oracle.diffusers_scheduler(config, double=double)
    return torch_oracle.run_diffusers(solver, noise, lambda k, x: outputs[k], dtype)


def run_ours(sampler: Sampler, e: Any, noise: Any) -> tuple[Any, float]:
    """The final sample, and the largest magnitude on the way: rounding is relative to it."""
    x, before, largest = noise[0], (np.zeros_like(noise[0]),) * 2, 1.0
    for k, row in enumerate(sampler.table):
        x, before = advance(row, x, e[k], before)
        if k + 1 < len(noise):
            x = x + row[NOISE] * noise[k + 1]
        largest = max(largest, np.abs(x).max(), np.abs(before[0]).max())
    return x, largest


def float32_rounding(sampler: Sampler, config: dict[str, Any]) -> float:
    """What float32 costs diffusers, relative to the largest magnitude.

    DDPM takes beta as 1 - A_t / A_previous of two float32 numbers near 1: an error of 2^-24 that is
    the larger the smaller beta is. DPM-Solver++ takes differences of float32 logarithms.
    """
    if sampler.name == "ddpm":
        share = theirs(config).alphas_cumprod.double().numpy()[sampler.timesteps]
        return 1e-6 + 2.0**-24 / (1 - share / np.append(share[1:], 1.0)).min()
    return 1e-5 if sampler.name == "dpmsolver++" else 2e-6


def compare(config: dict[str, Any]) -> None:
    K = config["num_inference_steps"]
    sampler = make_sampler(config)
    assert sampler.table.shape == (K, 9)
    np.testing.assert_array_equal(sampler.timesteps, theirs(config).timesteps.numpy())
    rng = np.random.default_rng(K)
    e, noise = rng.standard_normal((2, K, 4, 6))
    ours, largest = run_ours(sampler, e, noise)
    error = np.abs(run_theirs(config, e, noise, double=False) - ours).max()
    assert error <= float32_rounding(sampler, config) * largest
    if sampler.name != "dpmsolver++":  # that one is float32 inside, whatever it is given
        # PyTorch's float32 x ** 0.5 is off by one unit in a fifth of all cases, so not to the bit
        for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 2e-6)):
            ours, largest = run_ours(make_sampler(config, coefficients=dtype), e, noise)
            expected = run_theirs(config, e, noise, double=True, coefficients=dtype)
            assert np.abs(expected - ours).max() <= tolerance * largest


def test_float32_coefficients_are_those_of_diffusers_where_it_shows():
    """Small betas in many steps: computed in float64 the same chunk is another by 1e-5."""
    config = scheduler(type="ddpm", beta_schedule="linear", num_train_timesteps=1000)
    config["num_inference_steps"] = 1000
    rng = np.random.default_rng(1)
    e, noise = rng.standard_normal((2, 1000, 4, 6))
    expected = run_theirs(config, e, noise, double=True, coefficients=np.float32)
    errors = [
        np.abs(run_ours(make_sampler(config, coefficients=dtype), e, noise)[0] - expected).max()
        for dtype in (np.float32, np.float64)
    ]
    assert errors[0] < 2e-6 and errors[1] > 1e-5


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpmsolver++"])
def test_loop_equals_diffusers(kind, schedule, spacing, prediction, clip):
    for K in STEPS:
        if kind == "dpmsolver++" and spacing != "trailing" and K == 100:
            continue  # diffusers divides by zero; see the tests of these two cases
        config = scheduler(
            type=kind,
            beta_schedule=schedule,
            timestep_spacing=spacing,
            prediction_type=prediction,
            clip_sample=clip,
            num_inference_steps=K,
        )
        compare(config)


@pytest.mark.parametrize(
    "keys",
    [
        {"type": "ddpm", "variance_type": "fixed_small_log"},
        {"type": "ddpm", "variance_type": "fixed_large"},
        {"type": "ddpm", "clip_sample_range": 0.3},
        {"type": "ddpm", "num_train_timesteps": 1000, "beta_schedule": "linear"},
        {"type": "ddpm", "num_train_timesteps": 37, "num_inference_steps": 37},
        {"type": "ddpm", "steps_offset": 3},
        {"type": "ddim", "set_alpha_to_one": False},
        {"type": "ddim", "steps_offset": 1, "set_alpha_to_one": False},
        {"type": "ddim", "steps_offset": 1, "prediction_type": "sample"},
        {"type": "ddim", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"},
        {"type": "dpmsolver++", "steps_offset": 2},
        *(
            {"type": kind, "prediction_type": "v_prediction", **keys}
            for kind in ("ddpm", "ddim", "dpmsolver++")
            for keys in (
                {"clip_sample": False, "timestep_spacing": "trailing"},
                {"clip_sample_range": 0.5, "beta_schedule": "linear"},
            )
        ),
        {"type": "dpmsolver++", "clip_sample_range": 0.3},
        {"type": "dpmsolver++", "num_train_timesteps": 1000, "timestep_spacing": "linspace"},
        {"type": "dpmsolver++", "num_inference_steps": 14, "timestep_spacing": "trailing"},
        {"type": "dpmsolver++", "num_inference_steps": 15, "timestep_spacing": "trailing"},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_options_equal_diffusers(keys):
    compare(scheduler(**({"num_inference_steps": 16} | keys)))


@pytest.mark.parametrize("train", [1, 2, 37, 100, 999, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_are_those_of_diffusers_bit_for_bit(schedule, train):
    for start, end in ((0.0001, 0.02), (0.00085, 0.012), (0.001, 0.05)):
        config = scheduler(
            type="ddim",
            num_train_timesteps=train,
            num_inference_steps=train,
            beta_schedule=schedule,
            beta_start=start,
            beta_end=end,
        )
        a = make_sampler(config).table[:, 0]
        levels = (a[::-1] ** -2).astype(np.float32)
        np.testing.assert_array_equal(levels, theirs(config).alphas_cumprod.numpy())


@pytest.mark.parametrize(
    ("t", "amplification", "c0", "ct", "sigma"),
    [
        (99, 2029.2, 0.015568297, 0.031615104, 0.99937862),
        (98, 64.169, 0.023376762, 0.49969642, 0.86567485),
        (78, 3.11076, 0.03210946, 0.94589869, 0.29106259),
        (50, 1.44599, 0.04249065, 0.95471531, 0.17494105),
        (10, 1.01707, 0.16382557, 0.83615481, 0.06809615),
        (1, 1.00087, 0.63895610, 0.36104381, 0.02008703),
    ],
)
def test_check_values_of_the_squared_cosine_schedule(t, amplification, c0, ct, sigma):
    """Computed elsewhere in double throughout; ours start from float32 levels, hence 1e-4."""
    sampler = make_sampler(scheduler())
    row = dict(zip(COLUMNS, sampler.table[99 - t], strict=True))
    assert sampler.timesteps[99 - t] == t
    assert row["a"] == pytest.approx(amplification, rel=1e-4)
    assert row["b"] == pytest.approx(-np.sqrt(row["a"] ** 2 - 1), rel=1e-6)
    assert (row["c"], row["d"]) == pytest.approx((c0, ct), rel=1e-4)
    assert row["h"] == pytest.approx(sigma, rel=1e-4)
    assert (row["r"], row["f"], row["g"]) == (1, 0, 0)


def test_ddpm_ends_in_the_clipped_sample():
    last = make_sampler(scheduler()).table[-1]
    assert last[3:].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_a_sound_table(kind, spacing):
    for K in range(1, 101):
        if (kind, spacing, K) == ("dpmsolver++", "leading", 100):
            continue
        config = scheduler(type=kind, timestep_spacing=spacing, num_inference_steps=K)
        sampler = make_sampler(config)
        assert sampler.timesteps.shape == (K,)
        assert sampler.table.shape == (K, 9)
        assert np.isfinite(sampler.table).all()
        strictly = not (kind == "dpmsolver++" and K == 100)
        assert (np.diff(sampler.timesteps) <= -strictly).all()
        assert 0 <= sampler.timesteps[-1] <= sampler.timesteps[0] <= 99
        row = dict(zip(COLUMNS, sampler.table.T, strict=True))
        assert row["g"][0] == 0
        assert row["h"][-1] == 0
        assert sampler.adds_noise == (kind == "ddpm" and K > 1)
        if kind != "ddim":  # which may end short of the clean sample: see _fill_ddim
            assert row["c"][-1] == 1
            assert row["d"][-1] == 0


def test_one_timestep_too_many_of_trailing_is_left_out():
    config = scheduler(type="ddim", timestep_spacing="trailing", num_inference_steps=29)
    broken = theirs(config).timesteps.numpy()
    if len(broken) == 29:
        pytest.skip("this diffusers has mended its trailing spacing")
    assert broken[-1] == -1
    np.testing.assert_array_equal(make_sampler(config).timesteps, broken[:-1])


def test_a_repeated_timestep_of_dpmsolver_changes_nothing():
    config = scheduler(type="dpmsolver++", timestep_spacing="linspace", clip_sample=False)
    sampler = make_sampler(config)
    (k,) = np.flatnonzero(np.diff(sampler.timesteps) == 0)
    c, d, g = (sampler.table[:, COLUMNS.index(name)] for name in "cdg")
    assert (c[k], d[k], g[k]) == (0, 1, 0)
    assert g[k + 1] == 0
    # x0 known and constant: any consistent solver follows x = alpha x0 + sigma e exactly
    x0, e = np.full((100, 1, 3), 0.3), np.full((100, 1, 3), -0.7)
    constant = make_sampler(config | {"prediction_type": "sample"})
    share = np.append(sampler.table[:, 0] ** -2, 1.0)
    start = np.sqrt(share[0]) * x0[0] + np.sqrt(1 - share[0]) * e[0]
    x, _ = run_ours(constant, x0, start[None])
    np.testing.assert_allclose(x, x0[0], rtol=0, atol=1e-12)


def test_dpmsolver_clips_as_the_checkpoint_says():
    def bound(name: str | None, **keys: Any) -> float:
        config = scheduler(num_inference_steps=10, **keys)
        if keys.get("clip_sample") is None:
            del config["clip_sample"]
        return make_sampler(config, sampler=name).table[:, COLUMNS.index("r")].max()

    override = "dpmsolver++"
    assert bound(override, type="ddpm", clip_sample=True, clip_sample_range=1.5) == 1.5
    assert bound(override, type="ddim", clip_sample=False) == np.inf
    assert bound(override, type="ddpm") == 1
    assert bound(None, type="dpmsolver++", clip_sample=True) == 1
    assert bound(None, type="dpmsolver++") == np.inf
    assert bound("ddim", type="dpmsolver++") == np.inf


def test_arguments_override_the_checkpoint():
    sampler = make_sampler(scheduler(), sampler="ddim", num_inference_steps=np.int64(8))
    assert (sampler.name, sampler.timesteps.tolist()) == ("ddim", [84, 72, 60, 48, 36, 24, 12, 0])
    assert sampler.prediction_type == "epsilon"
    assert make_sampler(scheduler(num_inference_steps=5)).timesteps.tolist() == [80, 60, 40, 20, 0]
    for array in (sampler.table, sampler.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("keys", "arguments", "words"),
    [
        ({"type": "heun"}, {}, ["scheduler.type", '"ddpm", "ddim", "dpmsolver++"', "'heun'"]),
        ({}, {"sampler": "ddpmm"}, ["sampler", '"ddpm", "ddim", "dpmsolver++"', "'ddpmm'"]),
        ({}, {"num_inference_steps": 101}, ["num_inference_steps", "1 to 100", "101"]),
        ({}, {"num_inference_steps": 0}, ["num_inference_steps", "1 to 100", "0"]),
        ({}, {"num_inference_steps": 2.5}, ["num_inference_steps", "integer", "2.5"]),
        ({}, {"num_inference_steps": True}, ["num_inference_steps", "integer", "True"]),
        ({"beta_schedule": "sigmoid"}, {}, ["beta_schedule", '"linear"', "'sigmoid'"]),
        ({"timestep_spacing": "log"}, {}, ["timestep_spacing", '"trailing"', "'log'"]),
        ({"prediction_type": "score"}, {}, ["prediction_type", '"v_prediction"', "'score'"]),
        ({"variance_type": "learned"}, {}, ["variance_type", '"fixed_small"', "'learned'"]),
        ({"thresholding": True}, {}, ["thresholding"]),
        ({"steps_offset": 1}, {}, ["steps_offset", "at most 0", "got 1"]),
        ({"beta_schedule": "linear", "beta_end": 1.0}, {}, ["beta_end", "0.02"]),
        (
            {"type": "ddpm", "variance_type": "fixed_large", "timestep_spacing": "trailing"},
            {"num_inference_steps": 10},
            ["variance_type", "fixed_small", "fixed_large"],
        ),
        (
            {"type": "dpmsolver++"},
            {},
            ["num_inference_steps", "at most 99", "got 100", "10 is usual"],
        ),
    ],
)
def test_misuse_is_named(keys, arguments, words):
    with pytest.raises(ValueError) as error:
        make_sampler(scheduler(**keys), **arguments)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_largest_offset_named_in_an_error_works():
    for spacing, K in itertools.product(["leading"], (1, 7, 40)):
        config = scheduler(timestep_spacing=spacing, num_inference_steps=K, steps_offset=100)
        with pytest.raises(ValueError, match="at most ([0-9]+)") as error:
            make_sampler(config)
        most = int(str(error.value).split("at most ")[1].split()[0])
        assert make_sampler(config | {"steps_offset": most}).timesteps[0] == 99


# Flow matching


def test_euler_steps_follow_the_field():
    """The ODE x' = e(t) with e of its own at each time, on LeRobot's float32 grid."""
    for K in (1, 3, 10, 100):
        sampler = make_sampler({"type": "euler", "num_inference_steps": K})
        grid = torch.linspace(0, 1, K + 1)
        np.testing.assert_array_equal(sampler.timesteps, grid[:-1].double().numpy())
        e = np.random.default_rng(K).standard_normal((K, 4, 6))
        x, _ = run_ours(sampler, e, np.ones((1, 4, 6)))
        expected = torch.ones(4, 6, dtype=torch.float64)
        for k in range(K):
            expected = expected + (grid[k + 1] - grid[k]).item() * torch.tensor(e[k])
        np.testing.assert_allclose(x, expected.numpy(), rtol=0, atol=1e-14)
        assert sampler.prediction_type == "velocity" and not sampler.adds_noise


def test_the_mixture_of_a_flow_is_that_of_its_straight_path():
    """With the true velocity of one pair, every sample on the way is their mixture."""
    sampler = make_sampler({"type": "euler", "num_inference_steps": 8})
    data, noise = np.random.default_rng(0).standard_normal((2, 5))
    x = noise
    for k, (a, b, r, c, d, f, g, h, q) in enumerate(sampler.table):
        signal, level = sampler.mixture(k)
        np.testing.assert_allclose(x, signal * data + level * noise, rtol=0, atol=1e-6)
        np.testing.assert_allclose(a * x + b * (data - noise), data, rtol=0, atol=1e-6)
        assert np.isinf(r) and (c, g, h, q) == (0, 0, 0, 0)
        x = d * x + f * (data - noise)
    np.testing.assert_allclose(x, data, rtol=0, atol=1e-6)


def solve(sampler: Sampler, field: Any, x: Any) -> Any:
    """The end of x' = field(x, t) along the rows of a table."""
    before = (np.full_like(x, np.nan),) * 2  # which nothing may read before it is there
    for row, t in zip(sampler.table, sampler.timesteps, strict=True):
        used = dict(zip(COLUMNS, row, strict=True))
        known = tuple(x if not used[key] else b for key, b in zip("gq", before, strict=True))
        x, (x0, _) = advance(row, x, field(x, t), known)
        before = (x0, before[0])
    return x


def pendulum(x: Any, t: float) -> Any:
    """Two numbers that swing, driven: of x and of t, and not linear."""
    return np.stack([x[1], -3 * np.sin(x[0]) + 2 * np.cos(5 * t)])


def test_rk4_steps_are_those_of_runge_and_kutta():
    """Four evaluations a step as LeRobot has them, on its grid of times."""
    for steps in (1, 2, 7, 25, 100):
        sampler = make_sampler({"type": "rk4", "num_inference_steps": 4 * steps})
        grid = torch.linspace(0, 1, steps + 1)
        asked, x = [], np.array([[1.0, -2.0], [0.5, 3.0]])
        got = solve(sampler, pendulum, x)
        for now, after in zip(grid[:-1], grid[1:], strict=True):
            t, dt = now.item(), (after - now).item()
            times = torch.tensor([t, t + dt / 2, t + dt / 2, t + dt])  # float32, as the network's
            asked += times.tolist()
            k1 = pendulum(x, asked[-4])
            k2 = pendulum(x + dt * k1 / 2, asked[-3])
            k3 = pendulum(x + dt * k2 / 2, asked[-2])
            k4 = pendulum(x + dt * k3, asked[-1])
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        assert sampler.timesteps.tolist() == asked
        np.testing.assert_allclose(got, x, rtol=0, atol=1e-13)
        assert sampler.prediction_type == "velocity" and not sampler.adds_noise


def test_rk4_is_of_fourth_order():
    integrate = pytest.importorskip("scipy.integrate")
    start = np.array([1.0, -2.0])
    exact = integrate.solve_ivp(
        lambda t, x: pendulum(x, t), (0, 1), start, "DOP853", rtol=1e-12, atol=1e-12
    ).y[:, -1]
    errors = {
        kind: [
            np.abs(
                solve(make_sampler({"type": kind}, num_inference_steps=n), pendulum, start) - exact
            ).max()
            for n in (32, 64)
        ]
        for kind in ("euler", "rk4")
    }
    assert 1.8 < errors["euler"][0] / errors["euler"][1] < 2.3
    assert 14 < errors["rk4"][0] / errors["rk4"][1] < 19
    assert errors["rk4"][0] < 1e-3 * errors["euler"][0]


def test_a_warm_start_of_rk4_begins_with_a_step():
    whole = make_sampler({"type": "rk4", "num_inference_steps": 12})
    last = tail(whole, 8)
    np.testing.assert_array_equal(last.table, whole.table[4:])
    assert last.mixture(0) == (np.float32(1 / 3), 1 - np.float32(1 / 3))
    with pytest.raises(ValueError, match="warm_start: expected a multiple of 4 .*got 6; choose 4"):
        tail(whole, 6)


@pytest.mark.parametrize(
    ("keys", "override", "message"),
    [
        ({"type": "euler"}, {"sampler": "ddim"}, 'expected one of "euler", "rk4", got .ddim.'),
        ({"type": "rk4"}, {"sampler": "ddpm"}, 'expected one of "euler", "rk4", got .ddpm.'),
        ({"type": "ddim"}, {"sampler": "rk4"}, 'sampler: expected one of "ddpm".*got .rk4.'),
        ({"type": "rk4", "num_inference_steps": 2}, {}, "a multiple of 4 .*got 2; choose 4 or 8"),
        ({"type": "rk4"}, {"num_inference_steps": 10}, "a multiple of 4 .*got 10; choose 8 or 12"),
        ({"type": "euler", "num_inference_steps": 7}, {"sampler": "rk4"}, "got 7; choose 4 or 8"),
        ({"type": "rk4", "clip_sample": True}, {}, "unknown key 'clip_sample'"),
        ({"type": "ddpm"}, {"sampler": "euler"}, 'sampler: expected one of "ddpm".*got .euler.'),
        ({"type": "euler", "prediction_type": "epsilon"}, {}, 'expected one of "velocity"'),
        ({"type": "ddpm", "prediction_type": "velocity"}, {}, 'expected one of "epsilon"'),
        ({"type": "euler", "clip_sample": True}, {}, "unknown key 'clip_sample'"),
        ({"type": "euler"}, {"num_inference_steps": 0}, "num_inference_steps: expected an integer"),
    ],
)
def test_velocities_and_the_rest_are_not_mixed(keys, override, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(keys, **override)
