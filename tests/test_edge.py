"""The Python edge: who may pass arrays, what is borrowed, the GIL, streams, locking, memory."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dlpack_maker import Producer, array, forbidden
from policies import make_policy, noises, observations

from tsad import COMPUTE, REUSE_ROLLOUT, Plan, _core, planners

TESTS = Path(__file__).parent
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")


def as_torch(x: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(x)


def as_jax(x: Any) -> Any:
    return pytest.importorskip("jax").numpy.asarray(x)


FROM_NUMPY = {
    "numpy": lambda x: x,
    "torch": as_torch,
    "jax": as_jax,
    "legacy": Producer,
    "versioned": lambda x: Producer(x, versioned=True),
    "no strides": lambda x: Producer(x, strides=False),
    "byte offset": lambda x: Producer(x, versioned=True, byte_offset=64),
    "no deleter": lambda x: Producer(x, deleter=False),
    "pinned": lambda x: Producer(x, device=(3, 0)),
}


# ---- borrowing


@pytest.mark.parametrize("producer", FROM_NUMPY)
def test_nothing_is_copied_on_the_way_in(producer: str) -> None:
    x = array((2, 3, 4))
    given = FROM_NUMPY[producer](x)
    seen = _core._borrow(given)
    expected = given.unsafe_buffer_pointer() if producer == "jax" else x.ctypes.data
    assert seen["ptr"] == expected
    assert (seen["shape"], seen["dtype"]) == ((2, 3, 4), "float32")
    assert seen["kind"] != "numpy" or producer == "numpy"


def test_numpy_dlpack_capsules_of_both_kinds_are_understood() -> None:
    x = array((3, 2))

    class Wrapped:
        def __init__(self, **keywords: Any) -> None:
            self.keywords = keywords

        def __dlpack_device__(self) -> Any:
            return x.__dlpack_device__()

        def __dlpack__(self, **_: Any) -> Any:
            return x.__dlpack__(**self.keywords)

    assert _core._borrow(Wrapped())["kind"] == "dlpack"
    if "max_version" in (x.__dlpack__.__doc__ or ""):
        assert _core._borrow(Wrapped(max_version=(1, 0)))["kind"] == "dlpack_versioned"


def test_dtypes_and_flags_are_read() -> None:
    for dtype in ("float64", "int64", "uint8"):
        x = np.zeros(3, dtype)
        assert _core._borrow(x)["dtype"] == dtype
        assert _core._borrow(Producer(x))["dtype"] == dtype
    x.setflags(write=False)
    assert _core._borrow(x)["read_only"]
    assert _core._borrow(Producer(x, versioned=True, read_only=True))["read_only"]
    assert not _core._borrow(Producer(x, versioned=True))["read_only"]


@pytest.mark.parametrize("versioned", [False, True])
def test_capsules_are_consumed_once(versioned: bool) -> None:
    policy = make_policy()
    x = observations(policy, 0)
    producer = Producer(x, versioned=versioned)
    expected = policy(x, noise=noises(policy, 1))
    for calls in (1, 2, 3):
        got = policy(producer, noise=noises(policy, 1))
        assert np.array_equal(got, expected)
        assert producer.deleted == producer.exports == calls
        assert producer.capsule_name.startswith("used_dltensor")
    wrong = Producer(x[..., :-1].copy(), versioned=versioned)
    with pytest.raises(ValueError, match="obs: expected shape"):
        policy(wrong)
    assert wrong.deleted == wrong.exports == 1


def test_a_used_capsule_and_a_foreign_version_are_refused() -> None:
    x = array((2, 2))
    producer = Producer(x)
    capsule = producer.__dlpack__()

    class Again:
        def __dlpack_device__(self) -> Any:
            return (1, 0)

        def __dlpack__(self, **_: Any) -> Any:
            return capsule

    _core._borrow(Again())
    with pytest.raises(TypeError, match="unused DLPack capsule"):
        _core._borrow(Again())
    future = Producer(x, versioned=True, major=2)
    with pytest.raises(TypeError, match="expected DLPack version 1, got 2.0"):
        _core._borrow(future)
    assert future.deleted == 1


def test_the_device_is_checked_before_the_data_is_asked_for() -> None:
    for device, name in (((2, 1), "cuda:1"), ((8, 0), "metal:0"), ((99, 0), "type 99;")):
        with pytest.raises(TypeError, match=f"expected memory of the CPU.*got.*{name}"):
            _core._borrow(forbidden(device))


@pytest.mark.parametrize("producer", FROM_NUMPY)
def test_every_producer_gives_the_same_actions(producer: str) -> None:
    policy = make_policy(lanes=2)
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    wrap = FROM_NUMPY[producer]
    assert np.array_equal(policy(wrap(obs), noise=wrap(noise)), expected)
    sample = noise[0]
    assert np.array_equal(
        policy.predict_noise(wrap(sample), 3, wrap(obs)), policy.predict_noise(sample, 3, obs)
    )


@pytest.mark.parametrize("producer", [p for p in FROM_NUMPY if p != "jax"])
def test_out_is_written_in_place_and_returned(producer: str) -> None:
    policy = make_policy(lanes=2)
    obs, noise = observations(policy, 0), noises(policy, 1)
    for whole in (False, True):
        expected = policy(obs, noise=noise, return_horizon=whole)
        memory = np.full_like(expected, np.nan)
        out = FROM_NUMPY[producer](memory)
        assert policy(obs, noise=noise, out=out, return_horizon=whole) is out
        assert np.array_equal(memory, expected)


def test_jax_arrays_are_constants() -> None:
    policy = make_policy()
    shape = (1, policy.n_action_steps, policy.action_dim)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        policy(observations(policy, 0), out=as_jax(np.zeros(shape, np.float32)))


def test_shapes_of_the_contract() -> None:
    policy = make_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    n, a = policy.n_action_steps, policy.action_dim
    with_lanes = policy(obs, noise=noise)
    assert with_lanes.shape == (1, n, a) and with_lanes.dtype == np.float32
    without = policy(obs[0], noise=noise)
    assert np.array_equal(without, with_lanes[0])
    horizon = policy(obs[0], noise=noise, return_horizon=True)
    assert horizon.shape == (policy.horizon, a)
    begin = policy.n_obs_steps - 1
    assert np.array_equal(horizon[begin : begin + n], without)
    out = np.empty((n, a), np.float32)
    assert policy(obs[0], noise=noise, out=out) is out
    assert policy(obs, noise=noise, lanes=0).shape == (1, n, a)
    several = make_policy(lanes=3)
    for lanes in (2, [2], (2,), np.array([2]), range(2, 3), [np.int64(2)]):
        assert several(obs, noise=noise, lanes=lanes).shape == (1, n, a)


# ---- noise


def stream(seed: int, *spawn: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=spawn)))


def draw(generator: np.random.Generator, policy: Any, rows: int | None = None) -> Any:
    shape = (rows or policy.num_inference_steps, policy.horizon, policy.action_dim)
    return generator.standard_normal(shape, dtype=np.float32)


def test_noise_matters() -> None:
    """The tests below compare actions: another number anywhere in the noise must show."""
    policy = make_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    for index in ((0, 0, 0, 0), (3, 0, 4, 1), (7, 0, 2, 0)):
        other = noise.copy()
        other[index] += 0.5
        assert not np.array_equal(policy(obs, noise=other), expected), index


def test_noise_is_numpys_own() -> None:
    policy = make_policy(lanes=3)
    obs = observations(policy, 0)
    policy.reset(seed=7)
    generators = [stream(7, lane) for lane in range(3)]
    for _ in range(3):  # the streams go on
        noise = np.stack([draw(g, policy) for g in generators], axis=1)
        assert np.array_equal(policy(obs), policy(obs, noise=noise))


def test_a_seed_per_lane() -> None:
    policy = make_policy(lanes=4)
    obs = observations(policy, 0, 2)
    policy.reset(lanes=[3, 1], seed=[11, 12])
    noise = np.stack([draw(stream(11), policy), draw(stream(12), policy)], axis=1)
    expected = policy(obs, noise=noise, lanes=[3, 1])
    policy.reset(lanes=np.array([3, 1]), seed=np.array([11, 12]))
    assert np.array_equal(policy(obs, lanes=[3, 1]), expected)
    policy.reset(lanes=[3, 1], seed=5)  # an int: the lane's number counts, not its place
    noise = np.stack([draw(stream(5, lane), policy) for lane in (3, 1)], axis=1)
    assert np.array_equal(policy(obs, lanes=[3, 1]), policy(obs, noise=noise, lanes=[3, 1]))
    policy.reset(seed=2**200)  # of any size
    policy.reset(lanes=2, seed=np.int64(3))
    policy.reset(lanes=2, seed=[3])


def test_lanes_that_are_not_listed_stay_untouched() -> None:
    policy, other = make_policy(lanes=3), make_policy(lanes=3)
    obs = observations(policy, 0)
    for p in (policy, other):
        p.reset(seed=1)
        p(obs)
    policy(obs[:2], lanes=[2, 0])
    policy.reset(lanes=[2, 0], seed=3)
    assert policy._stats(1) == other._stats(1)
    assert np.array_equal(policy(obs[1:2], lanes=1), other(obs[1:2], lanes=1))


def test_reset_without_a_seed_continues_the_stream() -> None:
    policy = make_policy()
    obs = observations(policy, 0)
    policy.reset(seed=4)
    policy(obs)
    policy.reset()
    generator = stream(4, 0)
    draw(generator, policy)
    noise = draw(generator, policy)[:, None]
    assert np.array_equal(policy(obs), policy(obs, noise=noise))


def test_policies_start_from_entropy() -> None:
    policy = make_policy(lanes=2)
    obs = np.repeat(observations(policy, 0, 1), 2, axis=0)
    first, second = policy(obs), make_policy(lanes=2)(obs)
    assert not np.array_equal(first, second) and not np.array_equal(first[0], first[1])


def test_samplers_without_added_noise_draw_the_first_row_only() -> None:
    policy = make_policy(sampler="ddim")
    assert not policy.adds_noise and make_policy().adds_noise
    obs = observations(policy, 0)
    policy.reset(seed=5)
    generator = stream(5, 0)
    for _ in range(2):
        noise = noises(policy, 9)
        noise[0, 0] = draw(generator, policy, 1)[0]
        assert np.array_equal(policy(obs), policy(obs, noise=noise))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_initial_sample_alone(sampler: str) -> None:
    """The rest is drawn as ever; its own first row is drawn, too, and ignored."""
    policy = make_policy(lanes=2, sampler=sampler)
    obs, initial = observations(policy, 0), noises(policy, 3)[0]
    policy.reset(seed=6)
    got = policy(obs, noise=initial)
    generators = [stream(6, 0), stream(6, 1)]
    if policy.adds_noise:
        noise = np.stack([draw(g, policy) for g in generators], axis=1)
    else:
        noise = np.zeros_like(noises(policy, 3))
    noise[0] = initial
    assert np.array_equal(got, policy(obs, noise=noise))
    rows = policy.num_inference_steps if policy.adds_noise else 1
    noise = np.zeros_like(noise)
    noise[:rows] = np.stack([draw(g, policy, rows) for g in generators], axis=1)
    # the streams stand where they should
    assert np.array_equal(policy(obs), policy(obs, noise=noise))


def test_predict_noise_touches_no_state() -> None:
    policy, other = make_policy(lanes=2), make_policy(lanes=2)
    obs, sample = observations(policy, 0), noises(policy, 1)[0]
    for p in (policy, other):
        p.reset(seed=2)
        p(obs)
    got = policy.predict_noise(sample=sample, step=1, obs=obs)
    assert got.shape == sample.shape
    more = policy.predict_noise(np.tile(sample, (3, 1, 1)), 1, np.tile(obs, (3, 1, 1)))
    assert np.array_equal(more[2:4], got)  # N is free
    assert policy.stats["chunks"] == other.stats["chunks"]
    assert np.array_equal(policy(obs), other(obs))


# ---- locking


def use_everything(policy: Any, obs: Any) -> dict[str, Any]:
    plan = np.zeros((policy.num_inference_steps, policy.n_blocks), np.uint8)
    return {
        "call": lambda: policy(obs),
        "predict_noise": lambda: policy.predict_noise(noises(policy, 0)[0], 0, obs),
        "reset": lambda: policy.reset(seed=1),
        "plan": lambda: setattr(policy, "plan", Plan(plan)),
        "free the plan": lambda: setattr(policy, "plan", None),
        "sparsity": lambda: setattr(policy, "sparsity", 0.5),
        "planner": lambda: setattr(policy, "planner", "dense"),
        "_set_plan": lambda: policy._set_plan(0, plan, plan),
        "read plan": lambda: policy.plan,
        "read stats": lambda: policy.stats,
        "read timings": lambda: policy.timings,
        "_ages": lambda: policy._ages(0),
    }


def test_a_second_caller_gets_an_error() -> None:
    """Deterministic: the observation's own __dlpack__ runs while the policy is taken."""
    policy = make_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    refused: dict[str, str] = {}

    class Nosy(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            for name, use in use_everything(policy, obs).items():
                try:
                    use()
                except RuntimeError as error:
                    refused[name] = str(error)
            assert policy.horizon and policy.lanes and policy.max_sparsity
            assert "SparsePolicy" in repr(policy)
            return super().__dlpack__(**keywords)

    expected = policy(obs, noise=noise)
    assert np.array_equal(policy(Nosy(obs), noise=noise), expected)
    assert refused.keys() == use_everything(policy, obs).keys()
    assert all("one thread at a time" in text for text in refused.values())
    for use in use_everything(policy, obs).values():
        use()  # and is free again


def slow_policy() -> Any:
    """A chunk takes some tens of milliseconds."""
    return make_policy("blockpush", steps=100)


def test_a_second_thread_gets_an_error_while_a_chunk_runs() -> None:
    policy = slow_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    results: list[Any] = []
    busy = 0
    thread = threading.Thread(target=lambda: results.append(policy(obs, noise=noise)))
    thread.start()
    while thread.is_alive():
        try:
            policy.reset(seed=1)
        except RuntimeError as error:
            assert "one thread at a time" in str(error)
            busy += 1
        time.sleep(0.001)
    thread.join()
    assert busy >= 3
    assert np.array_equal(results[0], expected)


@pytest.mark.parametrize("what", ["chunk", "predict_noise"])
def test_another_thread_works_while_a_chunk_runs(what: str) -> None:
    policy = slow_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    many = np.tile(noise[0], (100, 1, 1)), np.tile(obs, (100, 1, 1))
    count, stop = [0], threading.Event()

    def work() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=work)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # nobody is made to give the GIL away
    try:
        before = count[0]
        if what == "chunk":
            policy(obs, noise=noise)
        else:
            policy.predict_noise(many[0], 0, many[1])
        after = count[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert after - before >= 5


def test_policies_of_one_model_run_in_threads() -> None:
    first = make_policy("blockpush", steps=20)
    second = _core.Policy(first.model)
    obs, noise = observations(first, 0), noises(first, 1)
    expected = first(obs, noise=noise)
    results: dict[int, Any] = {}

    def run(index: int, policy: Any) -> None:
        results[index] = [policy(obs, noise=noise) for _ in range(5)]

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, expected) for index in (0, 1) for a in results[index])


# ---- lifetimes


def test_an_uninitialised_policy_says_so() -> None:
    class Forgetful(_core.Policy):
        def __init__(self) -> None:
            pass

    policy = Forgetful()
    for use in (lambda: policy.lanes, lambda: policy.reset(), lambda: policy(np.zeros(3))):
        with pytest.raises(RuntimeError, match="not initialised"):
            use()


def test_objects_are_initialised_once() -> None:
    policy = make_policy()
    with pytest.raises(RuntimeError, match="already initialised"):
        _core.Policy.__init__(policy, policy.model)
    with pytest.raises(RuntimeError, match="already initialised"):
        policy.model.__init__()
    with pytest.raises(TypeError, match="model: expected a tsad._core.Model"):
        _core.Policy(3)  # type: ignore[arg-type]
    for name, value in (("lanes", 0), ("lanes", 10**9), ("threads", 0), ("threads", 65)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            _core.Policy(policy.model, **{name: value})
    with pytest.raises(TypeError, match="lanes: expected an integer"):
        _core.Policy(policy.model, lanes=1.5)  # type: ignore[arg-type]


def test_a_policy_keeps_its_model_and_is_collected() -> None:
    policy = make_policy()
    model = policy.model
    references = sys.getrefcount(model)
    more = [_core.Policy(model) for _ in range(3)]
    assert sys.getrefcount(model) == references + 3
    del more
    assert sys.getrefcount(model) == references
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    policy.planner = lambda _, s, own=policy: planners.uniform_sparse(own, s)  # a cycle
    ghost = weakref.ref(policy)
    gc.disable()
    try:
        del policy
        assert ghost() is not None  # the cycle is one: counting references does not free it
        gc.collect()
    finally:
        gc.enable()
    assert ghost() is None
    assert np.array_equal(_core.Policy(model)(obs, noise=noise), expected)


def test_a_model_reads_its_tensors_once() -> None:
    from cases import config, random_tensors

    from tsad.config import PolicyConfig
    from tsad.load import make_model
    from tsad.samplers import make_sampler

    case = config("tiny")
    tensors = random_tensors(case["network"], 0)
    counts = {name: sys.getrefcount(x) for name, x in tensors.items()}
    sampler = make_sampler(case["scheduler"], num_inference_steps=4)
    model = make_model(PolicyConfig.from_dict(case), tensors, None, sampler)
    assert counts == {name: sys.getrefcount(x) for name, x in tensors.items()}
    policy = _core.Policy(model)
    obs, noise = observations(policy, 0), noises(policy, 1)
    before = policy(obs, noise=noise)
    for x in tensors.values():
        x[...] = np.nan
    assert np.array_equal(policy(obs, noise=noise), before)


# ---- memory


def test_no_allocation_while_a_chunk_runs(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux" or SANITIZED:
        pytest.skip("needs a C compiler, glibc, and a build without sanitizers")
    library = tmp_path / "malloc_count.so"
    source = TESTS / "malloc_count.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    program = TESTS / "count_allocations.py"
    package = str(Path(_core.__file__).parents[1])
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": package}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no allocation in 400 chunks" in done.stdout
    assert "nor in 10 calls of an encoder" in done.stdout


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps freed memory")
def test_a_hundred_thousand_chunks_do_not_grow() -> None:
    policy = make_policy(sampler="ddim", steps=2)
    sources = np.full((2, policy.n_blocks), REUSE_ROLLOUT, np.uint8)
    sources[0] = COMPUTE
    policy.plan = Plan(sources)
    obs = observations(policy, 0)
    tensor = Producer(obs)
    for _ in range(2000):
        policy(obs)
    gc.collect()
    before = resident_bytes()
    for i in range(100_000):
        policy(obs if i % 2 else tensor)
        if i % 100 == 0:
            policy.reset(seed=i)
    gc.collect()
    assert resident_bytes() - before < 1 << 20
    assert tensor.deleted == 50_000
