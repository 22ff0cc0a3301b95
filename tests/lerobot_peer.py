"""LeRobot's own tests, pointed at tsad: ``pytest -p lerobot_peer`` in LeRobot's sources.

    pytest -p lerobot_peer --chunks alone.json TESTS                        LeRobot alone
    pytest -p lerobot_peer --tsad --alone alone.json --chunks tsad.json TESTS

With ``--tsad`` the diffusion policies that LeRobot's tests make are sampled as those of a user who
installed the plugin and set ``TSAD=exact``. Each chunk is sampled again by LeRobot's own loop from
the same random numbers, and has to be the same. The run fails where a chunk that tsad should sample
was not, or differs, where tsad sampled none at all, and, given ``--alone``, where a test that
passed alone does not, or not as many of its chunks were sampled. `.ci/lerobot` runs both.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# normalised actions, from -1 to 1, after up to 100 steps in float32
BOUND = 2e-5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tsad")
    group.addoption("--tsad", action="store_true", help="sample LeRobot's policies in tsad")
    group.addoption("--chunks", type=Path, help="write outcomes and chunks of each test here")
    group.addoption("--alone", type=Path, help="what --chunks wrote of the same tests without tsad")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.tsad:
        os.environ["TSAD"] = "exact"
        import lerobot_policy_tsad  # noqa: F401  (as LeRobot's commands do at their start)
    config.pluginmanager.register(Peer(config), "tsad-peer")


def owner_classes() -> Iterator[type]:
    """What samples in the policies that this LeRobot has."""
    from tsad.lerobot.patch import kinds

    for kind in kinds():
        yield from kind.classes()[1]


class Peer:
    """Looks at every chunk of every test."""

    def __init__(self, config: pytest.Config) -> None:
        self.tsad: bool = config.option.tsad
        self.file: Path | None = config.option.chunks
        self.before: Path | None = config.option.alone
        self.seen: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"outcome": "", "sampled": 0, "tsad": 0, "apart": 0.0}
        )
        self.wrong: list[str] = []
        self.now = ""
        self.inside = 0
        for owner in owner_classes():
            self._watch(owner)
        if self.tsad:
            from tsad.lerobot.engine import Engine

            sample = Engine.sample

            @functools.wraps(sample)
            def counting(*args: Any, **kwargs: Any) -> Any:
                self.inside += 1
                return sample(*args, **kwargs)

            Engine.sample = counting  # type: ignore[method-assign]

    def _watch(self, owner: Any) -> None:
        method = owner.conditional_sample
        original = getattr(method, "_tsad_original", method)

        @functools.wraps(method)
        def conditional_sample(model: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            state, inside = torch.get_rng_state(), self.inside
            chunk = method(model, *args, **kwargs)
            test = self.seen[self.now]
            test["sampled"] += 1
            if self.inside > inside:
                test["tsad"] += 1
                after = torch.get_rng_state()
                torch.set_rng_state(state)
                apart = float((original(model, *args, **kwargs) - chunk).abs().max())
                test["apart"] = max(test["apart"], apart)
                if not apart <= BOUND:
                    self.wrong.append(f"{self.now}: {apart:.1e} from LeRobot's own chunk")
                if not torch.equal(torch.get_rng_state(), after):
                    self.wrong.append(f"{self.now}: other random numbers than LeRobot's were drawn")
            elif self.tsad and not torch.is_grad_enabled():
                self.wrong.append(f"{self.now}: a chunk was not sampled in tsad")
            return chunk

        owner.conditional_sample = conditional_sample

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now = nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.seen[report.nodeid]
        if report.when == "call" or report.outcome != "passed":
            if test["outcome"] in ("", "passed"):
                test["outcome"] = report.outcome

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps(self.seen, indent=1))
        if self.tsad and not self.inside:
            self.wrong.append("tsad sampled no chunk at all")
        if self.before is not None:
            self._compare(json.loads(self.before.read_text()))
        if self.wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _compare(self, alone: dict[str, Any]) -> None:
        for name, before in alone.items():
            now = self.seen.get(name)
            if now is None:
                self.wrong.append(f"{name}: ran alone, but not now")
                continue
            if before["outcome"] == "passed" != now["outcome"]:
                self.wrong.append(f"{name}: passed alone, {now['outcome']} with tsad")
            if before["sampled"] != now["tsad"]:
                given = f"{before['sampled']} chunks alone, {now['tsad']} in tsad"
                self.wrong.append(f"{name}: {given}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        line = terminalreporter.write_line
        alone = {} if self.before is None else json.loads(self.before.read_text())
        columns = ["file", "tests", "passed alone", "passed", "chunks", "in tsad", "furthest apart"]
        line("")
        line(f"| {' | '.join(columns)} |")
        line("| --- |" + " ---: |" * (len(columns) - 1))
        for file in sorted({name.partition("::")[0] for name in self.seen}):
            mine, theirs = (
                [test for name, test in some.items() if name.partition("::")[0] == file]
                for some in (self.seen, alone)
            )
            before, now = (sum(t["outcome"] == "passed" for t in some) for some in (theirs, mine))
            sampled, inside = (sum(t[key] for t in mine) for key in ("sampled", "tsad"))
            apart = f"{max(t['apart'] for t in mine):.1e}" if inside else ""
            cells = [f"`{file}`", len(mine), before if theirs else "", now, sampled, inside, apart]
            line(f"| {' | '.join(map(str, cells))} |")
        for wrong in self.wrong:
            line(f"tsad: {wrong}", red=True)
