"""LeRobot's server of asynchronous inference with tsad; `.ci/lerobot` installs what it needs."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lerobot")
grpc = pytest.importorskip("grpc")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from tsad.lerobot import is_accelerated, patch, plugin, policy_server, restore  # noqa: E402

torch.set_num_threads(1)
STATE, CAMERA = "observation.state", "observation.images.top"
JOINTS = ["one.pos", "two.pos"]


def save_policy(folder: Path) -> Path:
    """A small diffusion policy with a camera, random weights, and its processors."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    config = DiffusionConfig(
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (2,)),
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 48, 48)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping={
            kind: NormalizationMode.IDENTITY for kind in ("STATE", "VISUAL", "ACTION")
        },
        down_dims=(16, 32),
        diffusion_step_embed_dim=16,
        noise_scheduler_type="DDIM",
        num_inference_steps=4,
        pretrained_backbone_weights=None,
        crop_shape=None,
        device="cpu",
    )
    DiffusionPolicy(config).save_pretrained(folder)
    for processor in make_pre_post_processors(config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)  # LeRobot's server writes its logs where it is imported
    from lerobot.async_inference import policy_server as theirs

    own = theirs.PolicyServer
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    yield
    theirs.PolicyServer = own
    patch.uninstall()
    patch.on_first_chunk = None


class Client:
    """What LeRobot's robot client sends, over gRPC."""

    def __init__(self, address: str) -> None:
        from lerobot.transport import services_pb2, services_pb2_grpc

        self.pb2, channel = services_pb2, grpc.insecure_channel(address)
        grpc.channel_ready_future(channel).result(
            timeout=300
        )  # a busy machine imports for a minute
        self.stub = services_pb2_grpc.AsyncInferenceStub(channel)
        self.stub.Ready(services_pb2.Empty())

    def load(self, folder: Path) -> None:
        from lerobot.async_inference.helpers import RemotePolicyConfig

        features = {
            STATE: {"dtype": "float32", "shape": [2], "names": JOINTS},
            CAMERA: {"dtype": "image", "shape": [48, 48, 3], "names": ["height", "width", "c"]},
        }
        specs = RemotePolicyConfig("diffusion", str(folder), features, 4, "cpu")
        self.stub.SendPolicyInstructions(self.pb2.PolicySetup(data=pickle.dumps(specs)))

    def actions(self, raw: dict[str, Any], step: int) -> torch.Tensor:
        from lerobot.async_inference.helpers import TimedObservation
        from lerobot.transport.utils import send_bytes_in_chunks

        seen = TimedObservation(timestamp=time.time(), timestep=step, observation=raw, must_go=True)
        self.stub.SendObservations(
            send_bytes_in_chunks(pickle.dumps(seen), self.pb2.Observation, silent=True)
        )
        answer = self.stub.GetActions(self.pb2.Empty())
        assert answer.data, "the server said nothing: its log has the error"
        timed = pickle.loads(answer.data)
        assert [action.get_timestep() for action in timed] == list(range(step, step + 4))
        return torch.stack([action.get_action() for action in timed])


def raw_observation(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (48, 48, 3), np.uint8)
    return {**dict(zip(JOINTS, rng.uniform(-1, 1, 2), strict=True)), "top": image, "task": "push"}


@pytest.fixture
def served() -> Any:
    """LeRobot's server as `policy_server.activate` leaves it, and its address."""
    from lerobot.async_inference import policy_server as theirs
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.transport import services_pb2_grpc

    policy_server.activate()
    servicer = theirs.PolicyServer(PolicyServerConfig(host="127.0.0.1", port=1, fps=1000))
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


def test_actions_are_lerobots_of_the_frame_repeated(served: Any, tmp_path: Path) -> None:
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    servicer, address = served
    folder = save_policy(tmp_path / "policy")
    client = Client(address)
    client.load(folder)
    policy = restore(DiffusionPolicy.from_pretrained(folder).eval())
    for step, seed in ((0, 1), (4, 2)):
        raw = raw_observation(seed)
        torch.manual_seed(seed)
        got = client.actions(raw, step)
        assert is_accelerated(servicer.policy)
        image = torch.from_numpy(raw["top"]).permute(2, 0, 1).float() / 255
        state = torch.tensor([raw[name] for name in JOINTS], dtype=torch.float32)
        batch = {
            STATE: state.expand(1, 2, 2),
            "observation.images": image.expand(1, 2, 1, 3, 48, 48),
        }
        torch.manual_seed(seed)
        with torch.inference_mode():
            expected = policy.diffusion.generate_actions(batch)[0]
        assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("asked", ["off", "sidecar"])
def test_who_asks_for_something_else_gets_it(
    asked: str, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, address = served
    folder = save_policy(tmp_path / "policy")
    if asked == "off":
        monkeypatch.setenv(plugin.VARIABLE, "off")
    else:
        (folder / plugin.SIDECAR).write_text(json.dumps({"num_inference_steps": 2}))
    client = Client(address)
    client.load(folder)
    assert client.actions(raw_observation(1), 0).isfinite().all()
    assert is_accelerated(servicer.policy) == (asked != "off")
    if asked != "off":
        engine = servicer.policy.diffusion.__dict__["_tsad"]
        assert engine.settings.num_inference_steps == 2


def test_a_sidecar_that_does_not_fit_is_the_clients_error(served: Any, tmp_path: Path) -> None:
    _, address = served
    folder = save_policy(tmp_path / "policy")
    (folder / plugin.SIDECAR).write_text(json.dumps({"num_inference_steps": 500}))
    with pytest.raises(grpc.RpcError, match=r"tsad\.json: num_inference_steps: .* got 500"):
        Client(address).load(folder)


def test_the_command_serves(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tsad.lerobot.policy_server", "--host=127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [*command, f"--port={port}"], stdout=log, stderr=log, cwd=tmp_path, env=environment
        )
    try:
        client = Client(f"127.0.0.1:{port}")
        client.load(folder)
        assert client.actions(raw_observation(1), 0).isfinite().all()
    finally:
        server.terminate()
        server.wait(30)
