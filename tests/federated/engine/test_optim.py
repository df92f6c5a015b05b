"""SlotAdamW is as many torch.optim.AdamW as there are clients."""

import pytest
import torch

from hilora.federated.engine.optim import SlotAdamW, Slotted


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_one_adamw_for_each_client_that_takes_part(weight_decay: float) -> None:
    torch.manual_seed(0)
    adapters = torch.randn(5, 3, 4, dtype=torch.float64)  # clients along dimension 1
    heads = torch.randn(3, 7, dtype=torch.float64)  # along dimension 0
    separate = [(adapters[:, g].clone().requires_grad_(), heads[g].clone().requires_grad_()) for g in range(3)]
    optimisers = [
        torch.optim.AdamW([{"params": [a], "lr": 1e-2}, {"params": [h], "lr": 3e-2}], weight_decay=weight_decay)
        for a, h in separate
    ]
    together = SlotAdamW([Slotted(adapters, 1, 1e-2), Slotted(heads, 0, 3e-2)], 3, weight_decay)
    for step in range(6):
        gradients = [torch.randn_like(adapters), torch.randn_like(heads)]
        takes_part = torch.tensor([True, step % 2 == 0, step < 4])
        together.step(gradients, takes_part)
        for g in takes_part.nonzero().flatten().tolist():
            separate[g][0].grad, separate[g][1].grad = gradients[0][:, g].clone(), gradients[1][g].clone()
            optimisers[g].step()
    for g, (a, h) in enumerate(separate):
        torch.testing.assert_close(adapters[:, g], a.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(heads[g], h.detach(), rtol=1e-12, atol=1e-12)


def test_clipping_and_rates_are_each_clients_own() -> None:
    torch.manual_seed(0)
    adapters, heads = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    separate = [(adapters[:, g].clone().requires_grad_(), heads[g].clone().requires_grad_()) for g in range(3)]
    optimisers = [torch.optim.AdamW(pair, lr=1e-2, weight_decay=0.1) for pair in separate]
    together = SlotAdamW([Slotted(adapters, 1, 1e-2), Slotted(heads, 0, 1e-2)], 3, 0.1, clip_norm=1.5)
    size = torch.tensor([0.01, 1.0, 5.0], dtype=torch.float64)  # of the clients' gradients: the first is never clipped
    for step in range(4):
        rate = torch.tensor([1.0, 0.5, 1 / (step + 1)], dtype=torch.float64)
        gradients = [torch.randn_like(adapters) * size[:, None], torch.randn_like(heads) * size[:, None]]
        together.step(gradients, torch.tensor([True] * 3), rate)
        for g in range(3):
            separate[g][0].grad, separate[g][1].grad = gradients[0][:, g].clone(), gradients[1][g].clone()
            norm = torch.nn.utils.clip_grad_norm_(separate[g], 1.5)
            assert (norm > 1.5) == (g > 0)
            optimisers[g].param_groups[0]["lr"] = 1e-2 * float(rate[g])
            optimisers[g].step()
    for g, (a, h) in enumerate(separate):
        torch.testing.assert_close(adapters[:, g], a.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(heads[g], h.detach(), rtol=1e-11, atol=1e-11)


def test_after_a_reset_it_starts_anew() -> None:
    torch.manual_seed(0)
    used, fresh = torch.zeros(2, 3), torch.zeros(2, 3)
    gradients = [[torch.randn(2, 3)] for _ in range(4)]
    both = torch.tensor([True, True])
    first = SlotAdamW([Slotted(used, 0, 0.1)], 2)
    for gradient in gradients:
        first.step(gradient, both)
    first.reset()
    used.zero_()
    second = SlotAdamW([Slotted(fresh, 0, 0.1)], 2)
    for gradient in gradients[:2]:
        first.step(gradient, both)
        second.step(gradient, both)
    assert torch.equal(used, fresh)


def test_a_client_that_never_takes_part_keeps_its_parameters_to_the_bit() -> None:
    parameter = torch.randn(2, 3)
    before = parameter.clone()
    optimiser = SlotAdamW([Slotted(parameter, 0, 1.0)], 2, weight_decay=0.5)
    for _ in range(3):
        optimiser.step([torch.randn(2, 3)], torch.tensor([True, False]))
    assert torch.equal(parameter[1], before[1])
    assert not torch.equal(parameter[0], before[0])


def test_a_part_is_as_if_the_rest_were_no_parameters() -> None:
    torch.manual_seed(0)
    whole = torch.randn(4, 2, 3, dtype=torch.float64)  # projections, clients
    part = torch.tensor([[1.0, 1], [0, 1], [1, 0], [0, 0]], dtype=torch.float64)[..., None]
    start, few = whole.clone(), [whole[part[:, g, 0] == 1, g].clone().requires_grad_() for g in range(2)]
    optimisers = [torch.optim.AdamW([tensor], lr=1e-2, weight_decay=0.1) for tensor in few]
    together = SlotAdamW([Slotted(whole, 1, 1e-2, part)], 2, 0.1, clip_norm=0.5)
    for _ in range(3):
        gradient = torch.randn_like(whole)
        together.step([gradient], torch.tensor([True, True]))
        for g, (tensor, optimiser) in enumerate(zip(few, optimisers, strict=True)):
            tensor.grad = gradient[part[:, g, 0] == 1, g].clone()
            assert torch.nn.utils.clip_grad_norm_([tensor], 0.5) > 0.5
            optimiser.step()
    for g, tensor in enumerate(few):
        torch.testing.assert_close(whole[part[:, g, 0] == 1, g], tensor.detach(), rtol=1e-11, atol=1e-11)
        assert torch.equal(whole[part[:, g, 0] == 0, g], start[part[:, g, 0] == 0, g])
