"""Ctrl-C: within a long call, and before a command has begun."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from engine import make
from policies import make_policy, noises, observations, state
from torch_encoder import Encoder

import tsad
from tsad import REUSE_ROLLOUT, _core, cli

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

SOON = 0.5  # seconds that a person waits without wondering
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
BACKENDS = [*_core.backends(), "guarded"]  # csrc/cpu/guarded.c


@contextmanager
def signalled(after: float = 0.3, number: int = signal.SIGINT) -> Iterator[list[float]]:
    """A signal to this process after so many seconds; when it was sent."""
    sent: list[float] = []

    def send() -> None:
        time.sleep(after)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        thread.join()


def interrupted(call: Callable[[], Any], match: str, after: float = 0.3) -> None:
    """Ctrl-C ends the call, soon."""
    with signalled(after) as sent:
        with pytest.raises(KeyboardInterrupt, match=match):
            call()
        waited = time.monotonic() - sent[0]
    assert waited < SOON * (4 if SANITIZED else 1)


@pytest.fixture(scope="module")
def bundled() -> Any:
    """A hundred lanes, of which a call takes many seconds."""
    return tsad.load("pusht", lanes=100)


def full(policy: Any, rows: int) -> Any:
    return np.full((rows, policy.n_obs_steps, policy.obs_dim), 256, np.float32)


@pytest.mark.slow
def test_a_call_of_a_hundred_lanes(bundled: Any) -> None:
    rows = np.arange(4)
    few, noise = full(bundled, 4), noises(bundled, 0, 4)
    bundled.reset(seed=0)
    first = bundled(few, noise=noise, lanes=rows).copy()
    out = np.full((100, bundled.n_action_steps, bundled.action_dim), 7, np.float32)
    interrupted(lambda: bundled(full(bundled, 100), out=out), "interrupted.*its lanes start anew")
    assert (out == 7).all()
    np.testing.assert_array_equal(bundled(few, noise=noise, lanes=rows), first)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_lanes_that_were_not_called_go_on(threads: int) -> None:
    """Lanes with earlier rollouts, all but one interrupted; a twin that never heard of it."""
    one = make_policy("pusht", lanes=16, threads=threads, steps=100)
    sources = np.zeros((100, one.n_blocks), np.uint8)
    sources[1:, 5] = REUSE_ROLLOUT
    one.plan = tsad.Plan(sources)
    twin = copy.copy(one)
    obs, noise = observations(one, 0), noises(one, 1, 2)
    for policy in one, twin:
        policy(obs[:2], noise=noise, lanes=[0, 1])
    interrupted(lambda: one(obs[1:], lanes=range(1, 16)), "start anew", after=0.15)
    twin.reset(lanes=[1])
    for lane in (0, 1, 15):
        np.testing.assert_array_equal(one._ages(lane), twin._ages(lane))
    got, wanted = (p(obs[:2], noise=noise, lanes=[0, 1]) for p in (one, twin))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_long_chunk(backend: str, threads: int) -> None:
    """Between its steps, also where threads share them."""
    steps = 2000
    policy = make("pusht", backend=backend, threads=threads, steps=steps, num_train_timesteps=steps)
    obs, sample = observations(policy, 0, 1), noises(policy, 1, 1)[0]
    before = policy.predict_noise(sample, 7, obs)
    interrupted(lambda: policy(obs), "its lanes start anew", after=0.15)
    np.testing.assert_array_equal(policy.predict_noise(sample, 7, obs), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_predicted_noise(backend: str) -> None:
    policy = make("pusht", backend=backend)
    rows = 1 << 14
    sample = np.zeros((rows, policy.horizon, policy.action_dim), np.float32)
    obs = np.zeros((rows, policy.n_obs_steps, policy.obs_dim), np.float32)
    interrupted(lambda: policy.predict_noise(sample, 5, obs), "interrupted: nothing is returned$")
    policy.predict_noise(sample[:3], 5, obs[:3])


@pytest.mark.parametrize("backend", _core.backends())
@pytest.mark.parametrize("threads", [1, 2])
def test_images(backend: str, threads: int) -> None:
    """Between images; the encoder then encodes the next as ever."""
    encoder = Encoder(height=24, width=24, keypoints=3, features=5)
    options = encoder.arguments() | {"backend": backend, "threads": threads}
    vision = _core.Vision(encoder.weights(), **options)
    images = np.zeros((20_000, 24, 24, 3), np.uint8)
    images[1] = 200
    before = vision.encode(images[:2])
    interrupted(lambda: vision.encode(images), "interrupted while encoding images", after=0.15)
    np.testing.assert_array_equal(vision.encode(images[:2]), before)


@pytest.mark.slow
def test_a_warm_start(bundled: Any) -> None:
    policy = tsad.load("pusht", lanes=100, warm_start=50)
    twin = tsad.load("pusht", lanes=100, warm_start=50)
    rows = [3, 0]
    obs, noise = full(policy, 2), noises(bundled, 0, 2)
    policy(obs, noise=noise, lanes=rows)
    interrupted(lambda: policy(full(policy, 100)), "start anew")
    wanted = twin(obs, noise=noise, lanes=rows)  # a first chunk
    np.testing.assert_array_equal(policy(obs, noise=noise, lanes=rows), wanted)


# ---- handlers


class StoppedError(Exception):
    pass


@contextmanager
def handling(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handlers_own_exception_keeps_its_type(bundled: Any) -> None:
    def stop(*_: Any) -> None:
        raise StoppedError("enough")

    with handling(stop), signalled(number=signal.SIGALRM), pytest.raises(StoppedError) as caught:
        bundled(full(bundled, 100))
    assert str(caught.value) == "enough"
    if sys.version_info >= (3, 11):
        assert "start anew" in caught.value.__notes__[0]


@pytest.mark.slow
def test_a_handler_that_returns_changes_nothing() -> None:
    """It runs within the call: the policy is busy for it, another policy is not."""
    policy, other = (make_policy("pusht", lanes=n, steps=100) for n in (16, 1))
    twin = copy.copy(policy)
    obs, noise = observations(policy, 0), noises(policy, 1)
    heard: list[Any] = []

    def note(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="running a chunk"):
            policy.reset()
        # a denormal, that the engine flushes to zero and Python doesn't
        heard.append((other(observations(other, 0)), np.float32(1e-42) * np.float32(0.5)))

    with handling(note), signalled(number=signal.SIGALRM):
        got = policy(obs, noise=noise)
    assert len(heard) == 1 and heard[0][1] > 0 and np.isfinite(heard[0][0]).all()
    np.testing.assert_array_equal(got, twin(obs, noise=noise))
    assert state(policy)[0] == state(twin)[0]


@pytest.mark.slow
def test_a_call_in_another_thread_is_not_interrupted() -> None:
    policy = make_policy("pusht", lanes=16, steps=100)
    twin = copy.copy(policy)
    obs, noise = observations(policy, 0), noises(policy, 1)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(policy(obs, noise=noise)))
    with pytest.raises(KeyboardInterrupt, match="^$"), signalled():
        thread.start()
        while True:
            time.sleep(0.01)
    thread.join()
    np.testing.assert_array_equal(got[0], twin(obs, noise=noise))


# ---- commands that have hardly begun

LINES = {
    "demo": ["demo"],
    "eval": ["eval", "pusht"],
    "collect": ["collect", "pusht", "--out", "o"],
    "plan": ["plan", "make", "pusht", "--out", "o.npz"],
    "tune": ["tune", "pusht", "--out", "o"],
    "bench": ["bench", "pusht"],
    "show": ["show", "nothing.npz"],
    "info": ["info", "pusht"],
    "certify": ["certify", "pusht", "--out", "o"],
    "convert": ["convert", "nothing.ckpt", "o"],
    "generate": ["generate", "--out", "o.npz"],
    "train_policy": ["train-policy", "nothing.npz", "--out", "o"],
    "fit": ["fit", "pusht", "--data", "nothing.npz", "--out", "o"],
    "train_pruner": ["train-pruner", "pusht", "--data", "nothing.npz", "--out", "o"],
}
PROGRAM = [sys.executable, "-m", "tsad"]
SCRIPT = "import sys; sys.argv[0] = 'tsad'; from tsad.cli import main; sys.exit(main())"


def stopped(command: list[str], seen: bytes, after: float, folder: Any) -> tuple[int, str]:
    """Code and errors of a command that gets SIGINT so long after it has imported ``seen``."""
    process = subprocess.Popen(
        [command[0], "-X", "importtime", *command[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.split()[-1:] == [seen]:
            break
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    lines += process.communicate(timeout=60)[1].splitlines(keepends=True)
    said = b"".join(line for line in lines if not line.startswith(b"import time:"))
    return process.returncode, said.decode()


@pytest.mark.parametrize("name", LINES)
def test_a_command_that_has_just_begun(name: str, tmp_path: Any) -> None:
    assert set(LINES) == set(cli.COMMANDS)
    for after in (0, 0.05, 0.1, 0.2, 0.4):
        code, err = stopped([*PROGRAM, *LINES[name]], b"tsad._program", after, tmp_path)
        # or it had ended, down to Python's own handler, which is none then: no word, and SIGINT
        finished = code in (0, 1, 2, -signal.SIGINT) and "interrupted" not in err
        assert code == 130 or finished and after >= 0.1, err
        assert "Traceback" not in err and "Exception ignored" not in err, err
    assert not list(tmp_path.glob("*.tmp"))


def test_the_script_that_has_just_begun(tmp_path: Any) -> None:
    command = [sys.executable, "-c", SCRIPT, "info", "pusht"]
    code, err = stopped(command, b"tsad._program", 0, tmp_path)
    assert (code, err.strip()) == (130, "tsad: interrupted")


def test_who_imports_tsad_keeps_pythons_own_handler(tmp_path: Any) -> None:
    code = "import tsad, signal; assert signal.getsignal(2) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)
