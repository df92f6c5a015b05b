"""Clip and noise: what one client can move, how large the noise is, what the accountant says, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.privacy import Privacy
from hilora.federated.protocol import Download, Rows, Stage, Upload, shared
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import STRATEGIES
from hilora.federated.sums import changes, groups
from tests.federated.conftest import Simulate, records, same
from tests.federated.test_vetting import head, table

N = 6
CLIENTS = torch.arange(N)
STAGE = Stage("root", 1, "root")
SENT = Download(STAGE, {"root": shared(table(1, 1.0), CLIENTS)}, shared(head(1, 1.0), CLIENTS))
GROUP = torch.tensor([0, 1, 0, 1, 1, 1])
GROUPED = Download(STAGE, {"root": Rows(table(2, 1.0), GROUP)}, Rows(head(2, 1.0), GROUP))
ALL = torch.ones(N, dtype=torch.bool)


def privacy(clip: float = 2.0, noise: float = 1.0, **options: Any) -> Privacy:
    return Privacy(TrainingSettings(dp_clip=clip, dp_noise=noise, **options))


def sent(sizes: Tensor) -> Upload:
    """What clients send that add a number to all of their 96 numbers."""

    def grown(value: Tensor) -> Tensor:
        return value + sizes.view(-1, *[1] * (value.dim() - 1)).to(value)

    return Upload(CLIENTS, torch.arange(N), {"root": table(N, 1.0).each(grown)}, head(N, 1.0).each(grown))


def flat(upload: Upload, download: Download = SENT) -> Tensor:
    """All that each client changed, `[n, D]`."""
    return torch.cat([value.flatten(1) for value in changes(upload, download).values()], 1).double()


def test_without_noise_it_is_the_mean_of_clipped_changes() -> None:
    numbers = flat(sent(torch.zeros(N))).shape[1]
    sizes = torch.tensor([0.0, 0.01, -0.02, 1.0, -500.0, 1e6])
    found = privacy(2.0, 1e-12).release(sent(sizes), SENT, ALL, 1, N)
    largest = 2.0 / numbers**0.5
    mean = (0.01 - 0.02 + largest - largest + largest) / N
    torch.testing.assert_close(flat(found), torch.full((N, numbers), mean).double(), rtol=1e-4, atol=1e-7)
    assert found.images.tolist() == [1] * N
    assert torch.equal(found.clients, CLIENTS)


@pytest.mark.parametrize("download", [SENT, GROUPED])
@pytest.mark.parametrize("other", [1e9, -3.0, 0.0, None])
def test_another_client_moves_the_sums_by_at_most_two_bounds(download: Download, other: float | None) -> None:
    """The sensitivity that the accountant counts with; None: its message is left out."""
    sizes, usable = torch.tensor([0.01, 0.5, -0.3, 0.02, 0.01, 0.0]), ALL.clone()
    changed = sizes.clone()
    changed[4] = 0.0 if other is None else other
    usable[4] = other is not None
    before = flat(privacy().release(sent(sizes), download, ALL, 1, N), download)
    after = flat(privacy().release(sent(changed), download, usable, 1, N), download)
    size = groups(download).bincount()[groups(download)]  # a mean is of so many
    moved = ((before - after) * size[:, None]).norm(dim=1)
    assert moved.max() <= 2 * 2.0 * (1 + 1e-5)
    assert moved[4] > 0
    assert (moved[groups(download) != groups(download)[4]] == 0).all()


def test_the_noise_has_its_size_and_a_stream_of_its_own() -> None:
    wide = Download(STAGE, {"root": shared(table(1, 1.0, 100), CLIENTS)})
    upload = Upload(CLIENTS, torch.ones(N).long(), {"root": table(N, 1.0, 100)})
    noise = flat(privacy(3.0, 2.0).release(upload, wide, ALL, 1, N), wide)
    assert (noise == noise[:1]).all()  # every client's message is the mean
    assert float(noise[0].std()) == pytest.approx(2.0 * 3.0 / N, rel=0.05)
    assert abs(float(noise[0].mean())) < 4 * 2.0 * 3.0 / N / noise.shape[1] ** 0.5
    again, later, other = (
        flat(one.release(upload, wide, ALL, round, N), wide)
        for one, round in ((privacy(3.0, 2.0), 1), (privacy(3.0, 2.0), 2), (privacy(3.0, 2.0, seed=1), 1))
    )
    assert torch.equal(noise, again)
    for different in (later, other):
        assert abs(float(torch.corrcoef(torch.stack([noise[0], different[0]]))[0, 1])) < 0.1
    secret = Privacy(TrainingSettings(dp_clip=3.0, dp_noise=2.0), seed=99)
    assert not torch.equal(flat(secret.release(upload, wide, ALL, 1, N), wide), noise)


def test_groups_have_means_and_noise_of_their_own() -> None:
    sizes = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.3, 0.3])
    means = flat(privacy(1e3, 1e-9).release(sent(sizes), GROUPED, ALL, 1, N), GROUPED)[:, 0]
    torch.testing.assert_close(means.float(), torch.where(GROUP == 0, 0.15, 0.3), rtol=1e-4, atol=0)
    noise = flat(privacy(1.0, 1.0).release(sent(0 * sizes), GROUPED, ALL, 1, N), GROUPED)
    assert torch.equal(noise[0], noise[2])
    assert not torch.allclose(noise[0] * 2, noise[1] * 4)


def test_epsilon_is_an_upper_bound_of_what_is_exactly_known() -> None:
    """One release to all clients is a Gaussian mechanism, whose ε is known in closed form."""
    one = privacy(noise=4.0)
    assert one.epsilon() == 0
    one.release(sent(torch.zeros(N)), SENT, ALL, 1, N)
    exact = dp_accounting.get_epsilon_gaussian(4.0 / 2, 1e-5)
    assert exact < one.epsilon() < 1.25 * exact
    for round in range(2, 10):
        one.release(sent(torch.zeros(N)), SENT, ALL, round, N)
    nine = dp_accounting.get_epsilon_gaussian(4.0 / 2 / 3, 1e-5)  # nine releases are one of a third of the noise
    assert nine < one.epsilon() < 1.25 * nine


def test_epsilon_falls_with_the_noise_and_with_sampling_and_not_with_groups() -> None:
    def spent(noise: float, share: float, download: Download = SENT) -> float:
        one = privacy(noise=noise, participation=share)
        one.release(sent(torch.zeros(N)), download, ALL, 1, 600)
        return one.epsilon()

    assert spent(8.0, 0.01) < spent(4.0, 0.01)
    assert spent(4.0, 0.01) < 0.5 * spent(4.0, 1.0)
    assert spent(4.0, 0.5) <= spent(4.0, 1.0)
    assert spent(4.0, 0.01, GROUPED) == spent(4.0, 1.0)
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    ).compose(dp_accounting.SampledWithoutReplacementDpEvent(600, 6, dp_accounting.GaussianDpEvent(2.0)))
    assert spent(4.0, 0.01) == accountant.get_epsilon(1e-5)


def test_what_sends_nothing_spends_nothing() -> None:
    one = privacy()
    found = one.release(Upload(CLIENTS, torch.arange(N)), SENT, ALL, 1, N)
    assert (found.images.tolist(), one.epsilon()) == ([1] * N, 0)


SUMS = [
    "fedit",
    "flexlora",
    "ffa-lora",
    "fedsa-lora",
    "feddpa-f",
    "feddpa-t",
    "pf2lora",
    "fedopal",
    "rolora",
    "sdflora",
]
OTHERS = set(STRATEGIES) - set(SUMS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*SUMS, "hilora", "head-only"])
def test_methods_that_need_means_alone_run_and_say_what_was_spent(
    simulate: Simulate, tmp_path: Path, strategy: str
) -> None:
    extra = {"groups": "true"} if strategy in ("hilora", "head-only") else {}
    simulation = simulate(strategy, dp_clip=1.0, dp_noise=0.5, rounds=[2, 1, 1], participation=0.6, **extra)
    summary = simulation.run()
    private = [stage.private for stage in simulation.stages for _ in range(stage.rounds)]
    spent = [record["epsilon"] for record in records(simulation)]
    for before, now, free in zip([0.0, *spent], spent, private, strict=False):
        assert (now == before) if free else (now > before)
    assert summary["privacy"]["epsilon"] == spent[-1]
    assert summary["privacy"]["releases"] == private.count(False)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["privacy"] == summary["privacy"]


@pytest.mark.parametrize("strategy", sorted(OTHERS))
def test_methods_that_need_more_than_means_are_refused(simulate: Simulate, strategy: str) -> None:
    with pytest.raises(InvalidValueError, match=rf"dp_clip=1.0: {strategy} needs more of what clients send"):
        simulate(strategy, dp_clip=1.0)


def test_robust_means_of_a_noised_mean_are_refused(simulate: Simulate) -> None:
    with pytest.raises(InvalidValueError, match="robust='trimmed' with dp_clip: the server has the noised mean alone"):
        simulate("fedit", dp_clip=1.0, robust="trimmed")


@pytest.mark.slow
def test_a_server_sees_nothing_of_a_client_but_the_mean(simulate: Simulate, tmp_path: Path) -> None:
    """Everything of one client is another's: what the server holds moves by no more than the bound allows."""
    simulation, other = (simulate("fedit", out=tmp_path / name, dp_clip=1e-3, rounds=[1, 0, 0]) for name in "ab")
    local = other.client.local

    def sent(*args: Any) -> Upload:
        upload = local(*args)
        evil = upload.clients == 2
        wild = {tier: rows.each(lambda value: value * -1e6).where(evil, rows) for tier, rows in upload.tiers.items()}
        return replace(upload, images=upload.images + 10**6 * evil, tiers=wild)

    setattr(other.client, "local", sent)  # noqa: B010
    simulation.run(), other.run()
    a, b = simulation.server.state_dict(), other.server.state_dict()
    moved = sum(
        float((value - found).double().square().sum())
        for name in ("root", "head")
        for value, found in zip(a[name].tensors().values(), b[name].tensors().values(), strict=True)
    )
    assert 0 < moved**0.5 <= 2 * 1e-3 / 5 * 1.01


@pytest.mark.slow
def test_what_was_spent_goes_through_a_checkpoint_and_does_not_depend_on_who_trains_together(
    simulate: Simulate, tmp_path: Path
) -> None:
    whole = simulate("fedit", dp_clip=1.0, rounds=[3, 0, 0])
    whole.run()
    resumed = simulate("fedit", dp_clip=1.0, rounds=[3, 0, 0], resume=True)
    assert resumed.reception.summary() == whole.reception.summary()
    alone = simulate("fedit", out=tmp_path / "alone", dp_clip=1.0, rounds=[3, 0, 0], clients_at_once=1)
    alone.run()
    everyone = torch.arange(6)
    a, b = whole.models(everyone), alone.models(everyone)
    assert same(a.tiers["root"].taken(), b.tiers["root"].taken(), 1e-4)
