"""EPTLayer: start values, units and the decomposition of a trained soft prompt."""

import math

import pytest
import torch

from ept import EPTConfig, EPTLayer, decompose
from tiny_models import all_parts


def layer(d=48, **settings):
    torch.manual_seed(0)
    return EPTLayer(all_parts(embed_scale=0.5, **settings), d)


def test_a_fresh_layer_is_exactly_a_short_soft_prompt():
    fresh = layer(d=400, max_text_length=400, rank=100, num_spaces=20, space_dim=20, token_rank=100)
    weight, ids = torch.randn(30, 400), torch.arange(12).view(2, 6)
    out = fresh(ids, None, weight)
    assert torch.equal(out[:, 5:], weight[ids])
    assert torch.equal(out[0, :5], 0.5 * fresh.prompt)
    for name in ("lowrank_b", "space_up", "token_up"):
        assert not getattr(fresh, name).any()
    expected = dict(lowrank_a=100**-0.5, space_down=400**-0.5, gate_weight=400**-0.5, token_down=400**-0.5)
    for name, std in expected.items():
        # The spread of n draws lies within 5 standard errors, std / √(2n), of its expectation.
        drawn = getattr(fresh, name)
        assert abs(drawn.std().item() - std) < 5 * std / math.sqrt(2 * drawn.numel())
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}


def test_parts_that_are_off_have_no_tensors():
    assert set(dict(layer(rank=0, num_spaces=0, token_rank=0).named_parameters())) == {"prompt"}
    assert layer(lowrank_update=False).lowrank_a is not None  # the fusion still reads A and B
    assert layer(lowrank_update=False, fusion=False).lowrank_a is None
    assert layer(spaces=False).gate_weight is None
    assert layer(token_update=False).token_down is None


@pytest.mark.parametrize(("rank", "rows"), [(1, 20), (3, 20), (6, 6), (10, 4)])
def test_the_decomposition_error_is_the_discarded_share_of_the_singular_values(rank, rows):
    d, e = 48, 0.5
    soft_prompt = torch.randn(5 + rows, d, dtype=torch.float64) * e
    fresh = layer(d, rank=rank, max_text_length=30)
    error = fresh.init_decompose(soft_prompt)
    singular = torch.linalg.svdvals(soft_prompt[5:])
    share = (singular[rank:].square().sum() / singular.square().sum()).sqrt().item()
    assert error == fresh.decomposition_error == pytest.approx(share, abs=1e-12)
    update = e * fresh.config.scale * fresh.lowrank_a @ fresh.lowrank_b
    assert not fresh.lowrank_a[rows:].any()
    # The factors are stored in fp32: a few of its units in the last place on top of the discarded part.
    measured = torch.linalg.norm(update[:rows].double() - soft_prompt[5:]) / torch.linalg.norm(soft_prompt[5:])
    assert measured.item() == pytest.approx(share, abs=1e-6)
    torch.testing.assert_close(fresh.prompt.double() * e, soft_prompt[:5], rtol=1e-6, atol=1e-6)


def test_both_factors_of_the_decomposition_carry_the_root_of_the_singular_values():
    a, b, _ = decompose(torch.randn(20, 30, dtype=torch.float64), 4)
    torch.testing.assert_close(a.T @ a, b @ b.T)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((4, 48), "does not fit"), ((40, 48), "does not fit"), ((10, 47), r"\[m, 48\]"), ((48,), r"\[m, 48\]")],
)
def test_a_soft_prompt_that_does_not_fit_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        layer().init_decompose(torch.zeros(shape))


def test_sizes_beyond_the_embeddings_width_are_refused():
    for settings in (dict(rank=9), dict(space_dim=9)):
        with pytest.raises(ValueError, match="larger than the embeddings' width 8"):
            layer(8, **dict(rank=3, space_dim=2) | settings)


def test_results_in_units_of_e_are_those_of_the_plain_formulas_scaled():
    """With E, P* and X divided by e everything is as with e = 1 (docs/method.md, "Units")."""
    config = all_parts(embed_scale=0.25)
    scaled = EPTLayer(config, 48)
    plain = EPTLayer(EPTConfig(**config.to_dict() | dict(embed_scale=1.0)), 48)
    with torch.no_grad():
        for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
            p.normal_(std=0.2)
            q.copy_(p)
    weight, ids = torch.randn(30, 48), torch.arange(12).view(2, 6)
    # Powers of two scale without rounding, so the two differ only by the order of a few products.
    torch.testing.assert_close(scaled(ids, None, 0.25 * weight), 0.25 * plain(ids, None, weight))


def test_reconstruct_is_the_prompt_of_forward():
    some = layer()
    with torch.no_grad():
        for p in some.parameters():
            p.normal_(std=0.2)
    prompt_star, gate = some.reconstruct()
    assert torch.equal(some(torch.zeros(1, 2, dtype=torch.int64), None, torch.randn(3, 48))[0, :5], prompt_star)
    assert gate.shape == (5, 4)


def test_dropout_leaves_hidden_units_of_the_token_conditioned_update_out_of_a_whole_batch():
    q, rate, steps = 6, 0.25, 100
    some = layer(token_rank=q, token_dropout=rate, activation="identity")
    with torch.no_grad():
        for p in some.parameters():
            p.normal_(std=0.2)
    weight, ids = torch.randn(30, 48), torch.arange(12).view(2, 6)
    kept = some.eval()(ids, None, weight)
    assert torch.equal(kept, some(ids, None, weight))  # none outside of training
    units = (weight[ids] @ some.token_down.T).unsqueeze(-1) * some.token_up  # [2, 6, q, d]: what each unit adds
    without = kept[:, 5:] - units.sum(2)

    def factors() -> torch.Tensor:
        """[2, 6, q] the factor of each unit at each token, out of a training pass."""
        out = some.train()(ids, None, weight)
        torch.testing.assert_close(out[:, :5], kept[:, :5])  # the prompt has no dropout
        # The units' shares of one token, [d, q], have full column rank: the factors are the one least-squares solution.
        change = (out[:, 5:] - without).unsqueeze(-1)
        return torch.linalg.lstsq(units.transpose(2, 3).double(), change.double()).solution.squeeze(-1)

    drawn = torch.stack([factors() for _ in range(steps)])
    left_out, scaled = drawn.abs() < 1e-3, (drawn - 1 / (1 - rate)).abs() < 1e-3
    assert (left_out | scaled).all()
    assert torch.equal(left_out, left_out[:, :1, :1].expand_as(left_out))  # the same for all tokens
    share = left_out[:, 0, 0].double().mean().item()
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / (steps * q))  # five standard errors
    assert some(ids, None, weight).grad_fn is not None


def test_a_unit_that_is_left_out_learns_nothing_in_that_step():
    some = layer(token_dropout=0.5)
    some.token_up.data.normal_()
    torch.manual_seed(3)
    some(torch.arange(12).view(2, 6), None, torch.randn(30, 48)).square().sum().backward()
    idle = (some.token_up.grad == 0).all(1)
    assert idle.any() and not idle.all()
    assert torch.equal(idle, (some.token_down.grad == 0).all(1))
