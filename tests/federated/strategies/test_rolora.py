"""RoLoRA: whose turn it is, what is sent, and that the mean is exact."""

from __future__ import annotations

import torch

from tests.federated.strategies.by_hand import SEEN, UNSEEN, Halves, everywhere

MEAN = 3.5


def test_the_factors_take_turns_and_b_begins() -> None:
    halves = Halves("rolora")
    A = halves.server.root.A[0].clone()
    halves.one_round()
    assert torch.equal(halves.server.root.A[0], A)
    everywhere(halves.server.root.B[0], MEAN)
    halves.round()
    torch.testing.assert_close(halves.server.root.A[0], A + MEAN)
    everywhere(halves.server.root.B[0], MEAN)
    halves.round()
    torch.testing.assert_close(halves.server.root.A[0], A + MEAN)
    everywhere(halves.server.root.B[0], 2 * MEAN)
    assert [call.how["factors"] for call in halves.calls] == ["B", "A", "B"]
    everywhere(halves.bias(), 3 * MEAN)


def test_the_product_of_the_means_is_the_mean_of_the_products() -> None:
    halves = Halves("rolora", [30, 10, 10, 10, 10, 30, 10, 10])
    halves.begin()
    for _ in range(4):
        before, upload = halves.server.root, halves.ask(SEEN, halves.server.configure(halves.stage, SEEN))
        sent = upload.tiers["root"]
        assert bool(sent.A) != bool(sent.B)
        A, B = (sent.A or before.A)[0], (sent.B or before.B)[0]
        share = upload.images.view(-1, 1, 1, 1) / upload.images.sum()
        halves.server.aggregate(halves.stage, upload)
        ((mean_A, mean_B),) = halves.server.root.factors
        torch.testing.assert_close((mean_B @ mean_A)[0], (share * (B @ A)).sum(0))


def test_a_round_without_images_is_no_turn() -> None:
    halves = Halves("rolora", [0] * 8).one_round()
    assert halves.server.turn == "B"
    halves.weights += 10
    halves.round()
    assert [call.how["factors"] for call in halves.calls] == ["B", "B"]
    assert halves.server.turn == "A"


def test_a_newcomer_trains_both_factors() -> None:
    halves = Halves("rolora").one_round()
    A = halves.server.root.A[0]
    trained = halves.personalised(UNSEEN).tiers["root"].taken()
    assert halves.calls[-1].how["factors"] == "AB"
    torch.testing.assert_close(trained.A[0][0], A[0] + 7)
    everywhere(trained.B[0][0], MEAN + 7)
