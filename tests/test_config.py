"""EPTConfig: presets, budgets and the errors of settings that cannot work."""

import pytest

from ept import EPTConfig


def test_the_papers_budget_on_t5_base_gives_the_papers_sizes():
    config = EPTConfig.for_budget(76_800, 768)
    assert (config.prompt_length, config.rank, config.num_spaces, config.space_dim) == (40, 30, 4, 2)
    assert config.max_text_length == 256 and not config.has_token_update
    assert config.num_parameters(768) == 76_800


@pytest.mark.parametrize("preset", ["paper", "input"])
@pytest.mark.parametrize("embed_dim", [64, 384, 512, 768, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 10, 50, 100, 333])
def test_a_budget_is_filled_exactly_or_just_below(rows, embed_dim, preset):
    for parameters in (rows * embed_dim, rows * embed_dim + embed_dim // 2):
        config = EPTConfig.for_budget(parameters, embed_dim, preset=preset)
        left = parameters - config.num_parameters(embed_dim)
        # What is left is less than the smallest thing that could still be added: a prompt row (2 for a token rank).
        assert 0 <= left < 2 * embed_dim


@pytest.mark.parametrize(("parameters", "d", "positions"), [(76_800, 768, 8), (38_400, 384, 16), (10**6, 768, 256)])
def test_a_budget_is_filled_where_the_rank_is_at_its_limit(parameters, d, positions):
    config = EPTConfig.for_budget(parameters, d, max_text_length=positions)
    assert 0 <= parameters - config.num_parameters(d) < d and config.rank <= min(d, positions)


def test_sizes_given_with_a_budget_are_kept():
    config = EPTConfig.for_budget(38_400, 384, prompt_length=20)
    assert config.prompt_length == 20 and 37_000 < config.num_parameters(384) <= 38_400
    assert EPTConfig.for_budget(38_400, 384, rank=10).rank == 10
    assert EPTConfig.for_budget(38_400, 384, num_spaces=0).num_spaces == 0
    assert EPTConfig.for_budget(38_400, 384, preset="input", prompt_length=2).prompt_length == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((100, 768), "at least 768"),
        ((0, 768), "parameters=0"),
        ((768, 0), "embed_dim=0"),
        ((7.5, 768), "parameters=7.5"),
    ],
)
def test_a_budget_that_holds_nothing_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        EPTConfig.for_budget(*arguments)


def test_given_sizes_beyond_the_budget_are_refused():
    with pytest.raises(ValueError, match="more than the budget"):
        EPTConfig.for_budget(7_680, 768, prompt_length=20)


def test_the_number_of_parameters_is_the_formula_of_the_method():
    config = EPTConfig.input_only(prompt_length=5, max_text_length=16, rank=3, token_rank=6)
    d = 32
    assert config.num_parameters(d) == 5 * d + 16 * 3 + 3 * d + 2 * 4 * d * 2 + d * 4 + 2 * 6 * d
    off = EPTConfig(
        prompt_length=5,
        rank=3,
        num_spaces=4,
        token_rank=6,
        lowrank_update=False,
        fusion=False,
        spaces=False,
        token_update=False,
    )
    assert off.num_parameters(d) == 5 * d


def test_a_dictionary_comes_back_and_unknown_keys_are_errors():
    config = EPTConfig.paper(prompt_length=7)
    assert EPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="promt_length"):
        EPTConfig.from_dict({"promt_length": 7})
    with pytest.raises(TypeError, match="promt_length"):
        EPTConfig(promt_length=7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(prompt_length=0), "prompt_length=0"),
        (dict(prompt_length=-3), "prompt_length=-3"),
        (dict(prompt_length=10**6), "prompt_length=1000000"),
        (dict(prompt_length=2.5), "whole number"),
        (dict(prompt_length="8"), "whole number"),
        (dict(prompt_length=True), "whole number"),
        (dict(max_text_length=0), "max_text_length=0"),
        (dict(rank=-1), "rank=-1"),
        (dict(rank=300), "max_text_length=256"),
        (dict(num_spaces=-1), "num_spaces=-1"),
        (dict(space_dim=0), "space_dim=0"),
        (dict(token_rank=-1), "token_rank=-1"),
        (dict(token_dropout=1.0), "token_dropout=1.0"),
        (dict(token_dropout=-0.1), "token_dropout=-0.1"),
        (dict(token_dropout=float("nan")), "token_dropout=nan"),
        (dict(token_dropout="0.1"), "token_dropout='0.1'"),
        (dict(token_dropout=True), "token_dropout=True"),
        (dict(prompt_start=-1), "prompt_start=-1"),
        (dict(alpha=0), "alpha=0"),
        (dict(alpha=float("nan")), "alpha=nan"),
        (dict(alpha="8"), "alpha='8'"),
        (dict(embed_scale=0.0), "embed_scale=0.0"),
        (dict(activation="tanh"), "activation='tanh'"),
        (dict(init="zeros"), "init='zeros'"),
        (dict(init="text"), "init_text"),
        (dict(init_text="words"), "init_text"),
        (dict(impl="cuda"), "impl='cuda'"),
        (dict(fusion=1), "fusion=1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        EPTConfig(**settings)
