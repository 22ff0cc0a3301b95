"""`tsad train-pruner`: a pruner that foresees what computing each cell gains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tsad
from tsad.checkpoint import read_folder
from tsad.load import read_policy

torch = pytest.importorskip("torch")

from pruner_cases import CHUNKS, HIDDEN, SETTINGS, STEPS, episodes, make, write_policy  # noqa: E402

from tsad.planners.base import own_values  # noqa: E402
from tsad.reference import ReferencePolicy  # noqa: E402
from tsad.samplers import make_sampler  # noqa: E402
from tsad.training import gates as gates_module  # noqa: E402
from tsad.training import pruner, pruner_net, sensitivity  # noqa: E402
from tsad.training.pruner import PrunerSettings, PrunerTrainer  # noqa: E402
from tsad.training.true_errors import TrueErrors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def any_width(monkeypatch):
    """A pruner for a network of a few thousand numbers can't be small beside it."""
    monkeypatch.setattr(pruner_net, "MOST", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "tiny")


# What is learned from


def test_segments_of_chunks_average_to_the_measured_effects(folder, tmp_path):
    trainer = make(folder, tmp_path)
    window = trainer._window(*trainer.windows[0])
    effects = sensitivity.measure(trainer.twin, [window], projections=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    signs = sensitivity.random_signs(trainer.twin, CHUNKS, 2, generator)
    each = sensitivity.chunk_segments(trainer.twin, window, signs)
    assert each.std(0).max() > 0
    np.testing.assert_allclose(each.mean(0), effects.segment, rtol=1e-4, atol=1e-9)


def test_loss_is_least_where_the_score_is_the_logarithm_of_the_mean():
    """Its gradient by hand, and its least value by float64 search."""
    rng = np.random.default_rng(0)
    gains = torch.from_numpy(rng.exponential(size=(5, 2, 3)))
    lead = torch.from_numpy(rng.standard_normal((5, 2, 3))).requires_grad_()
    pruner.gain_loss(lead, gains).backward()
    by_hand = (np.exp(lead.detach().numpy()) - gains.numpy()) / 30
    np.testing.assert_allclose(lead.grad.numpy(), by_hand, rtol=1e-12)
    tries = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    losses = [float(pruner.gain_loss(x.expand_as(gains), gains)) for x in tries]
    least = float(tries[int(np.argmin(losses))])
    assert least == pytest.approx(np.log(gains.numpy().mean()), abs=1e-3)
    assert pruner.gain_loss(torch.zeros(4), torch.ones(4)) == 0


def test_it_begins_as_the_static_table(folder, tmp_path):
    trainer = make(folder, tmp_path)
    trainer.prepare()
    tokens, gains = trainer.parts
    assert tokens.shape == (18, 3, 16) and gains.shape == (18, STEPS, 6)
    np.testing.assert_allclose(gains.mean(0)[1:], 1, rtol=1e-4)  # in units of the table's
    lead = trainer._lead(trainer.ema, tokens).detach()
    assert lead.shape == (18, STEPS - 1, 6) and float(lead.abs().max()) < 1e-2
    probe_training(trainer)
    assert trainer.evaluate().val_loss == pytest.approx(0, abs=0.01)
    scores = trainer.order.scores
    order = [np.argsort(-t, axis=None)[6:] for t in (scores, trainer.table.numpy())]
    np.testing.assert_array_equal(*order)  # drawn together, in the same order


def probe_training(trainer: PrunerTrainer) -> None:
    """Look at the chunks of the training instead of those held out."""
    trainer.probe, trainer.probed = trainer.parts, range(len(trainer.parts[0]))


def plant(trainer: PrunerTrainer) -> None:
    """Gains that follow from the observation: five times as much where its first token is high."""
    for name in ("parts", "probe"):
        tokens, gains = getattr(trainer, name)
        high = tokens[:, 0, 0] > trainer.parts[0][:, 0, 0].median()
        factor = torch.where(high, 5 / 3, 1 / 3)[:, None, None]
        setattr(trainer, name, (tokens, factor.expand_as(gains).contiguous()))


def test_it_learns_what_the_observation_says_and_the_control_does_not(folder, tmp_path):
    losses = {}
    for static in (False, True):
        settings = replace(SETTINGS, steps=150, static=static, weight_decay=0.0, power=1.0)
        trainer = make(folder, tmp_path / str(static), settings)
        trainer.prepare()
        plant(trainer)
        probe_training(trainer)
        trainer.best_error = np.inf
        trainer.fit(report_every=150)
        losses[static] = trainer.curve[-1].val_loss
    known = -np.mean([f * np.log(f) for f in (5 / 3, 1 / 3)])  # the entropy of what was planted
    assert losses[False] < 0.8 * known < 0
    assert losses[True] == pytest.approx(0, abs=0.02)


def test_only_what_sees_the_observation_is_trained(folder, tmp_path):
    trainer = make(folder, tmp_path)
    trainer.prepare()
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    for _ in range(5):
        trainer.train_step()
    after, n = trainer.net.state_dict(), trainer.fixed
    assert n == 12
    for name, part in (("0.weight", np.s_[:n]), ("0.bias", np.s_[:n]), ("2.weight", np.s_[:, :n])):
        assert torch.equal(before[name][part], after[name][part])
        assert not torch.equal(before[name], after[name])


def test_the_weights_of_least_true_error_on_held_out_episodes_are_kept(
    folder, tmp_path, monkeypatch
):
    """The error is a stand-in's, least after 20 steps or at the beginning."""
    for errors, best in (([5, 4, 3, 6, 7], 20), ([2, 4, 3, 6, 7], 0)):
        for last in (False, True):
            settings = replace(SETTINGS, steps=40, keep_last=last)
            trainer = make(folder, tmp_path / f"{best}{last}", settings)
            left = list(errors)
            monkeypatch.setattr(trainer, "_true_error", lambda net, left=left: left.pop(0))
            trainer.prepare()
            assert trainer.table_error == errors[0]
            weights = {0: trainer._weights()}
            trainer.fit(report_every=10, on_report=lambda r, t=trainer: weights.update(  # noqa: B023
                {r.step: t._weights()}
            ))  # fmt: skip
            wanted = 40 if last else best
            assert trainer.best_step == wanted
            assert trainer.best_error == errors[wanted // 10]
            for step, found in weights.items():
                same = all(torch.equal(v, found[name]) for name, v in trainer.best.items())
                assert same == (step == wanted)


# What is written


def test_a_trained_pruner_scores_in_the_engine_as_in_torch(folder, tmp_path):
    trainer = make(folder, tmp_path / "out", replace(SETTINGS, keep_last=True))
    trainer.prepare()
    plant(trainer)
    trainer.fit(report_every=10)
    assert trainer.best_step > 0
    config, tensors, weights = read_folder(tmp_path / "out")
    assert config.pruner.type == "mlp" and config.pruner.hidden_dim == HIDDEN
    for name, value in read_folder(folder)[1].items():
        np.testing.assert_array_equal(tensors[name], value)
    net = pruner.make_net(config, HIDDEN)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    policy = tsad.load(tmp_path / "out")
    reference = ReferencePolicy(config.to_dict(), tensors, weights)
    obs = episodes()[3].obs
    rows = pruner.pruner_rows(trainer.times, trainer.memory.tokens(obs))
    wanted = net(rows).detach().reshape(len(obs), STEPS, 6, 4)
    for one, scores in zip(obs, wanted, strict=True):
        flipped = policy._pruner_scores(one)[::-1]  # the engine's are in the order of the loop
        np.testing.assert_allclose(flipped, scores, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(reference.prune(one), scores, rtol=1e-4, atol=1e-3)


def test_its_own_choice_costs_what_was_asked_and_the_dial_what_is_said(folder, tmp_path):
    trainer = make(folder, tmp_path / "out", replace(SETTINGS, steps=150, keep_last=True))
    trainer.prepare()
    plant(trainer)
    trainer.fit(report_every=10)
    assert trainer.best_step > 0
    policy = tsad.load(tmp_path / "out")
    assert policy.planner == "pruner"
    costs: dict[Any, list[float]] = {}
    for dial in (None, 0.6, 0.75):
        policy.sparsity = dial
        for episode in episodes()[:3]:
            policy.reset(seed=0)
            policy(episode.obs[0])  # the first chunk is dense
            for obs in episode.obs:
                policy(obs)
                costs.setdefault(dial, []).append(policy.plan.sparsity)
    assert np.mean(costs[None]) == pytest.approx(0.6, abs=0.03)
    assert np.std(costs[None]) > 0.02  # it spends where it foresees more
    for dial in (0.6, 0.75):
        assert min(costs[dial]) >= dial and max(costs[dial]) < dial + 0.15


# Judged by the engine


def test_errors_are_those_of_the_reference(folder, tmp_path):
    """Of a random plan, against NumPy in float64, which begins each chunk anew as well."""
    trainer = make(folder, tmp_path)
    config, tensors, _ = read_folder(folder)
    reference = ReferencePolicy(config.to_dict(), tensors, dtype=np.float64)
    scale = np.array(config.normalizer.action.scale)
    rng = np.random.default_rng(0)
    for i in (0, 7, 23):
        episode = episodes()[i // CHUNKS]
        mask = rng.random((STEPS, 6)) < 0.5
        mask[0] = True
        plan = own_values(trainer.policy, mask)
        noise = episode.noise(trainer.policy)[i % CHUNKS][:, None]
        runs = []
        for sources in (plan.sources, 0 * plan.sources):
            reference.reset()
            obs = episode.obs[i % CHUNKS][None]
            runs.append(reference(obs, noise, first=sources)[0] * scale)
        wanted = ((runs[0] - runs[1]) ** 2).mean()
        assert wanted > 1e-6
        assert trainer.errors(i, plan) == pytest.approx(wanted, rel=1e-3)


def test_the_probe_costs_what_was_asked_and_its_error_is_that_of_its_plans(folder, tmp_path):
    trainer = make(folder, tmp_path, replace(SETTINGS, steps=60))
    trainer.prepare()
    plant(trainer)
    for _ in range(60):
        trainer.train_step()
    scores, _ = trainer._scores(trainer.ema, trainer.probe[0])
    assert scores.std(0).max() > 0.01
    ran = []
    error = TrueErrors.__call__

    def noted(self, i, plan):
        ran.append((i, plan))
        return error(self, i, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrueErrors, "__call__", noted)
        found = trainer._true_error(trainer.ema)
    assert [i for i, _ in ran] == list(range(18, 24))  # those held out
    sparsity = np.mean([plan.sparsity for _, plan in ran])
    assert 0.6 - 1e-9 <= sparsity < 0.65
    wanted = np.sqrt(np.mean([trainer.errors(i, plan) for i, plan in ran]))
    assert found == pytest.approx(wanted) and wanted > 0


def test_plans_that_were_searched_are_what_it_begins_as(folder, tmp_path):
    rng = np.random.default_rng(5)
    trainer = make(folder, tmp_path / "plain")
    sources = rng.choice(3, (STEPS, 6), p=[0.4, 0.3, 0.3]).astype(np.uint8)
    sources[0] = 0
    plan = tsad.Plan(sources, sources, types=trainer.policy.block_types)
    plan = trainer.policy._bind(plan)[0]  # with its costs
    settings = replace(SETTINGS, sparsity=plan.sparsity)
    trainer = make(folder, tmp_path / "out", settings, plans=[plan])
    trainer.prepare()
    trainer.write()
    policy = tsad.load(tmp_path / "out")
    policy.sparsity = plan.sparsity
    for obs in episodes()[0].obs[:3]:
        policy(obs)
    np.testing.assert_array_equal(policy.plan.sources == 0, sources == 0)


def test_levels_move_all_cells_alike_and_follow_the_true_error(folder, tmp_path):
    trainer = make(folder, tmp_path, replace(SETTINGS, method="levels", steps=80))
    trainer.prepare()
    costs = trainer._level_costs()
    assert (np.diff(costs) > 0).all()
    plans = [trainer.order.within(trainer.policy, cost) for cost in costs]
    levels = np.load(tmp_path / pruner.ERRORS_FILE)["values"]
    assert levels.shape == (24, len(costs))
    for i, j in ((3, 0), (20, len(costs) - 1)):
        assert levels[i, j] == pytest.approx(trainer.errors(i, plans[j]), rel=1e-6)
    relative = (levels / levels[:18].mean(0)).mean(1) ** SETTINGS.power
    wanted = relative / relative[:18].mean()
    np.testing.assert_allclose(trainer.parts[1][:, 2, 3], wanted[:18], rtol=1e-5)
    plant(trainer)
    for _ in range(80):
        trainer.train_step()
    lead = trainer._lead(trainer.net, trainer.parts[0]).detach().numpy()
    assert lead.std(0).max() > 0.1
    np.testing.assert_allclose(lead - lead[:, :1, :1], 0 * lead, atol=2e-3)


# Straight-through gates


def forced(folder, mask, of_type):
    """Gates (1, K, B, 3) of a plan that computes a mask, else own values or the last of a type."""
    gates = torch.zeros(1, STEPS, 6, 3, dtype=torch.float64)
    for k, b in np.ndindex(STEPS, 6):
        gates[0, k, b, 0 if mask[k, b] else 1 if of_type[k, b] else 2] = 1
    return gates


def test_gated_chunks_are_those_of_the_engine(folder, tmp_path):
    config, tensors, _ = read_folder(folder)
    policy = tsad.load(folder)
    twin = sensitivity.Twin(config, tensors, make_sampler(policy.config["scheduler"]))
    rng = np.random.default_rng(1)
    mask, of_type = rng.random((2, STEPS, 6)) < 0.5
    mask[0] = True
    sources = np.where(mask, 0, np.where(of_type, 1, 2)).astype(np.uint8)
    episode = episodes()[0]
    noise = episode.noise(policy, slice(0, 1))
    policy.plan = tsad.Plan(sources, sources, types=policy.block_types)
    wanted = policy(
        episode.obs[0], noise=np.ascontiguousarray(noise[0][:, None]), return_horizon=True
    )
    scale, offset = (np.array(getattr(config.normalizer.action, n)) for n in ("scale", "offset"))
    gates = forced(folder, mask, of_type).float()
    found = gates_module.gated_chunks(twin, episode.obs[:1], torch.from_numpy(noise), gates)
    np.testing.assert_allclose(found[0].numpy(), wanted * scale + offset, atol=2e-5)


def test_the_gradient_of_a_gate_is_that_of_differences(folder):
    """In float64, where nothing is reused afterwards: what is kept has no gradient by design."""
    config, tensors, _ = read_folder(folder)
    policy = tsad.load(folder)
    sampler = make_sampler(policy.config["scheduler"])
    twin = sensitivity.Twin(config, tensors, sampler, torch.float64)
    mask = np.ones((STEPS, 6), bool)
    mask[2] = (True, False, False, True, False, True)
    gates = forced(folder, mask, np.arange(6)[None] % 2 == np.zeros((STEPS, 1)))
    episode = episodes()[0]
    noise = torch.from_numpy(episode.noise(policy, slice(0, 1))).double()
    direction = torch.randn(noise.shape[2:], generator=torch.Generator().manual_seed(0)).double()

    def value(gates):
        chunk = gates_module.gated_chunks(twin, episode.obs[:1], noise, gates)
        return (chunk[0] * direction).sum()

    leaf = gates.clone().requires_grad_()
    value(leaf).backward()
    for b, source in ((1, 0), (2, 0), (4, 1), (1, 2), (0, 0)):
        step = torch.zeros_like(gates)
        step[0, 2, b, source] = 1e-5
        with torch.no_grad():
            slope = (value(gates + step) - value(gates - step)) / 2e-5
        assert abs(float(slope)) > 1e-6
        assert float(leaf.grad[0, 2, b, source]) == pytest.approx(float(slope), rel=1e-4)


def test_gates_keep_the_budget_and_let_gradients_through():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 4, 4, generator=rng, requires_grad=True)
    costs = (5, 1, 9, 2)
    for budget in (17.0, 40.0, 7 * 17.0):
        gates = gates_module.gates_of(logits, costs, budget)
        hard = gates.detach()
        assert torch.equal(hard.sum(-1).round(), torch.ones(5, 7, 4))
        assert (hard[:, 0, :, 0] == 1).all()
        spent = ((hard[..., 0] > 0.5) * torch.tensor(costs)).sum((1, 2))
        assert (spent <= budget).all() and (spent > budget - 10).all()
        for chunk, computed in zip(logits.detach(), hard[..., 0] > 0.5, strict=True):
            lead = (chunk[1:, :, 0] - chunk[1:, :, 1:3].amax(-1)).flatten()
            on = computed[1:].flatten()
            if on.any() and not on.all():
                assert lead[on].min() >= lead[~on].max()
        reused = chunk[..., 1:3].argmax(-1)[~computed]
        assert torch.equal(hard[-1][~computed].argmax(-1), reused + 1)
    gates = gates_module.gates_of(logits, costs, 40.0)
    weights = torch.randn(gates.shape, generator=rng)
    (gates * weights).sum().backward()
    assert (logits.grad[:, 0] == 0).all() and (logits.grad[..., 3] == 0).all()
    assert (logits.grad[:, 1:, :, :3] != 0).all()


def test_gates_learn_which_cell_matters(folder, tmp_path):
    """Their loss falls on the chunks that are trained on, and only what sees observations moves."""
    settings = replace(SETTINGS, method="gates", batch=4, steps=12, lr=3e-2, warmup=0)
    trainer = make(folder, tmp_path, settings)
    trainer.prepare()
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    losses = [float(trainer._loss(np.random.default_rng(9)))]
    for _ in range(12):
        trainer.train_step()
    losses.append(float(trainer._loss(np.random.default_rng(9))))
    assert losses[1] < losses[0]
    after, n = trainer.net.state_dict(), trainer.fixed
    assert torch.equal(before["2.weight"][:, :n], after["2.weight"][:, :n])
    assert not torch.equal(before["2.weight"], after["2.weight"])


def test_each_method_has_its_rate():
    settings = [PrunerSettings(method=m, steps=1) for m in ("effects", "levels", "gates")]
    assert [one.lr for one in settings] == [1e-3, 1e-3, 1e-4]


def test_the_default_width_costs_at_most_a_five_hundredth(monkeypatch):
    monkeypatch.undo()
    config, _, _ = read_policy("pusht")
    # by hand: two observation tokens of 256 once a chunk, 100 steps of 24 x 4 outputs
    dense = 100 * 8 * (2672640 + 61440 + 5242880)
    assert pruner.pruner_macs(config, 100, 256) == 256 * (2 * 256 + 100 * 96) < 0.002 * dense
    assert pruner.pruner_macs(config, 100, pruner.most_hidden(config, 100)) <= 0.002 * dense
    assert pruner.pruner_macs(config, 100, pruner.most_hidden(config, 100) + 1) > 0.002 * dense
