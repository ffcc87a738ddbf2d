"""ept_kernels.prompt_embed and its kin: the torch implementation against the specification, and what both promise."""

import itertools

import pytest
import torch

import ept_kernels
from ept_kernels import prompt_embed, prompt_embed_inputs, reconstruct_prompt, text_update

VOCAB = 50
PARTS = {
    "all": ("lowrank", "spaces", "token"),
    "paper": ("lowrank", "spaces"),
    "lowrank": ("lowrank",),
    "spaces": ("spaces",),
    "token": ("token",),
    "none": (),
}


def make_case(seed, *, parts="all", dtype=torch.float32, s=5, n=20, r=3, k=4, h=2, q=3, d=24, length=9, batch=3, e=1.0):
    """Arguments of prompt_embed: tensors drawn in float64 and rounded to `dtype`, ids, and a mask with holes."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * std).to(dtype)

    on = PARTS[parts]
    tensors = dict(prompt=draw(s, d, std=1.0))
    a, b = draw(n, r, std=r**-0.5), draw(r, d, std=0.3)
    u, v, gate = draw(k, h, d, std=d**-0.5), draw(k, h, d, std=0.3), draw(k, d, std=d**-0.5)
    down, up = draw(q, d, std=d**-0.5), draw(q, d, std=0.3)
    tensors |= dict(lowrank_a=a, lowrank_b=b) if "lowrank" in on else dict(lowrank_a=None, lowrank_b=None)
    spaces = (u, v, gate) if "spaces" in on else (None, None, None)
    tensors |= dict(zip(("space_down", "space_up", "gate_weight"), spaces, strict=True))
    tensors |= dict(token_down=down, token_up=up) if "token" in on else {}
    ids = torch.randint(VOCAB, (batch, length), generator=g)
    mask = torch.rand(batch, length, generator=g) > 0.3
    return dict(
        input_ids=ids, attention_mask=mask, embedding_weight=draw(VOCAB, d, std=e),
        scale=8 / r**0.5, embed_scale=e, **tensors,
    )  # fmt: skip


def double(case):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}


def assert_no_worse_than_plain(got, plain, truth, factor=2.0):
    """The error of `got` is at most `factor` times that of the plain formula, in norm.

    The floor is half a unit in the last place of the result, what rounding the exact value costs anybody: where the
    plain formula happens to be exact, nothing can be asked below it.
    """
    floor = torch.finfo(got.dtype).eps / 2 * truth.norm()
    error, allowed = (got.double() - truth).norm(), factor * torch.maximum((plain.double() - truth).norm(), floor)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", PARTS)
def test_torch_error_is_at_most_twice_that_of_the_plain_formula(parts, dtype):
    shapes = [
        dict(),
        dict(s=1, n=1, r=1, k=1, h=1, q=1, d=3, length=1, batch=1),
        dict(s=40, n=64, r=7, d=96, length=70),
    ]
    for seed, (shape, e, masked) in enumerate(itertools.product(shapes, (1.0, 0.055), (True, False))):
        case = make_case(seed, parts=parts, dtype=dtype, e=e, **shape)
        if not masked:
            case["attention_mask"] = None
        case["prompt_start"] = min(1, case["input_ids"].shape[1])
        truth = prompt_embed(**double(case), impl="reference")
        got, plain = prompt_embed(**case, impl="torch"), prompt_embed(**case, impl="reference")
        assert got.dtype == dtype
        assert_no_worse_than_plain(got, plain, truth)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("activation", ept_kernels.ACTIVATIONS)
def test_torch_equals_the_specification_in_float64(parts, activation):
    for switches in (dict(), dict(fusion=False), dict(lowrank_update=False)):
        case = make_case(1, parts=parts, dtype=torch.float64) | switches
        want = prompt_embed(**case, activation=activation, impl="reference")
        torch.testing.assert_close(
            prompt_embed(**case, activation=activation, impl="torch"), want, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients_of_every_trained_tensor_pass_gradcheck(impl):
    case = make_case(2, dtype=torch.float64, s=2, n=6, r=2, k=2, h=2, q=2, d=5, length=4, batch=2, e=0.5)
    case.pop("input_ids"), case.pop("embedding_weight")
    case["inputs_embeds"] = torch.randn(2, 4, 5, dtype=torch.float64)
    trained = [name for name, value in case.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]

    def run(*values):
        return prompt_embed_inputs(**case | dict(zip(trained, values, strict=True)), impl=impl)

    assert torch.autograd.gradcheck(run, tuple(case[name].requires_grad_() for name in trained))


@pytest.mark.parametrize("parts", PARTS)
def test_gradients_match_the_specification_in_float64(parts):
    case = make_case(3, parts=parts, dtype=torch.float64)
    names = [
        n for n, v in case.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and n != "embedding_weight"
    ]
    grads = {}
    for impl in ("torch", "reference"):
        leaves = {n: case[n].clone().requires_grad_() for n in names}
        out = prompt_embed(**case | leaves, impl=impl)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
        grads[impl] = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
    for got, want in zip(grads["torch"], grads["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_row_does_not_depend_on_its_padding(impl):
    case = make_case(4, dtype=torch.float64, batch=1, length=5)
    ids = case.pop("input_ids")
    case.pop("attention_mask")
    alone = prompt_embed(ids, None, **case, impl=impl)[0]
    pad = torch.zeros(1, 3, dtype=torch.int64)
    s = case["prompt"].shape[0]
    for columns, mask in (
        (torch.cat([ids, pad], 1), [1] * 5 + [0] * 3),
        (torch.cat([pad, ids], 1), [0] * 3 + [1] * 5),
        (torch.cat([ids[:, :2], pad, ids[:, 2:]], 1), [1, 1, 0, 0, 0, 1, 1, 1]),
    ):
        out = prompt_embed(columns, torch.tensor([mask]), **case, impl=impl)[0]
        torch.testing.assert_close(out[:s], alone[:s])
        torch.testing.assert_close(out[s:][torch.tensor(mask) == 1], alone[s:])
        torch.testing.assert_close(out[s:][torch.tensor(mask) == 0], case["embedding_weight"][pad[0]])


def test_all_parts_off_is_prompt_tuning():
    case = make_case(5, parts="none", e=0.5)
    out = prompt_embed(**case, impl="torch")
    rows = (case["prompt"] * 0.5).expand(3, -1, -1)
    torch.testing.assert_close(out, torch.cat([rows, case["embedding_weight"][case["input_ids"]]], 1), rtol=0, atol=0)


def test_text_beyond_the_covered_positions_gets_no_update():
    case = make_case(6, parts="lowrank", n=4, length=9)
    case["attention_mask"] = None
    text = prompt_embed(**case, impl="torch")[:, 5:]
    plain = case["embedding_weight"][case["input_ids"]]
    assert torch.equal(text[:, 4:], plain[:, 4:])
    assert not torch.allclose(text[:, :4], plain[:, :4])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bool_and_integer_masks_agree_and_inputs_stay_as_they_were(impl):
    case = make_case(7)
    before = {k: v.clone() for k, v in case.items() if isinstance(v, torch.Tensor)}
    want = prompt_embed(**case, impl=impl)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(
            prompt_embed(**case | dict(attention_mask=case["attention_mask"].to(dtype)), impl=impl), want
        )
    for name, value in before.items():
        assert torch.equal(case[name], value)


def test_strided_and_expanded_inputs_give_the_same_numbers():
    case = make_case(8)
    want = prompt_embed(**case, impl="torch")
    strided = {}
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            wide = torch.stack([value, torch.zeros_like(value)], dim=-1)
            value = wide[..., 0]
            assert not value.is_contiguous()
        strided[name] = value
    torch.testing.assert_close(prompt_embed(**strided, impl="torch"), want)
    row = case | dict(
        input_ids=case["input_ids"][:1].expand(3, -1), attention_mask=case["attention_mask"][:1].expand(3, -1)
    )
    out = prompt_embed(**row, impl="torch")
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_empty_text_gives_the_prompt_alone(impl):
    case = make_case(9, length=0)
    for mask in (case["attention_mask"], None):
        assert prompt_embed(**case | dict(attention_mask=mask), impl=impl).shape == (3, 5, 24)


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_the_prompt_stands_at_prompt_start(start):
    case = make_case(10)
    joined = prompt_embed(**case, prompt_start=start, impl="torch")
    first = prompt_embed(**case, impl="torch")
    prompt_star, gate = reconstruct_prompt(
        *(case[n] for n in ("prompt", "lowrank_a", "lowrank_b", "space_down", "space_up", "gate_weight")),
        scale=case["scale"], impl="torch",
    )  # fmt: skip
    assert torch.equal(joined[0, start : start + 5], prompt_star)
    assert torch.equal(torch.cat([joined[:, :start], joined[:, start + 5 :]], 1), first[:, 5:])
    torch.testing.assert_close(gate.sum(1), torch.ones(5))


def test_fp32_parameters_beside_a_bf16_backbone_give_bf16_and_fp32_gradients():
    case = make_case(11)
    case["embedding_weight"] = case["embedding_weight"].bfloat16()
    case["prompt"].requires_grad_()
    out = prompt_embed(**case, impl="torch")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert case["prompt"].grad.dtype == torch.float32
    truth = prompt_embed(
        **double({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in case.items()}), impl="reference"
    )
    # One rounding to bf16, whose unit in the last place is 2^-8 of a value: half of that, and fp32's noise.
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_does_not_reach_inside(impl):
    case = make_case(12)
    want = prompt_embed(**case, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prompt_embed(**case, impl=impl), want)


def test_given_embeddings_equal_the_look_up_and_receive_their_gradient():
    case = make_case(13)
    want = prompt_embed(**case, impl="torch")
    embeds = case.pop("embedding_weight")[case.pop("input_ids")].requires_grad_()
    out = prompt_embed_inputs(embeds, **case, impl="torch")
    assert torch.equal(out, want)
    (gradient,) = torch.autograd.grad(out.sum(), embeds)
    assert gradient.shape == embeds.shape and gradient.abs().sum() > 0


def test_the_frozen_embedding_receives_no_gradient():
    case = make_case(14)
    case["embedding_weight"].requires_grad_()
    case["prompt"].requires_grad_()
    prompt_embed(**case, impl="torch").sum().backward()
    assert case["embedding_weight"].grad is None


def test_continued_text_equals_the_same_columns_of_one_pass():
    case = make_case(15, n=6, length=9)
    case["attention_mask"] = None
    whole = prompt_embed(**case, impl="torch")[:, 5:]
    embeds = case["embedding_weight"][case["input_ids"]]
    settings = {k: case[k] for k in ("lowrank_a", "lowrank_b", "scale", "embed_scale", "token_down", "token_up")}
    positions = torch.arange(9).expand(3, -1)
    parts = [text_update(embeds[:, a:b], positions[:, a:b], **settings) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_the_same_inputs_give_the_same_bits():
    case = make_case(16)
    assert torch.equal(prompt_embed(**case, impl="torch"), prompt_embed(**case, impl="torch"))


BAD = {
    "unknown impl": (dict(impl="cuda"), ValueError, "impl='cuda'"),
    "unknown activation": (dict(activation="tanh"), ValueError, "activation='tanh'"),
    "float mask": (dict(attention_mask=torch.ones(3, 9)), TypeError, "attention_mask"),
    "mask of another length": (dict(attention_mask=torch.ones(3, 8, dtype=torch.bool)), ValueError, "attention_mask"),
    "id beyond the vocabulary": (dict(input_ids=torch.full((3, 9), VOCAB)), IndexError, "input_ids holds 50"),
    "negative id": (dict(input_ids=torch.full((3, 9), -1)), IndexError, "input_ids holds -1"),
    "float ids": (dict(input_ids=torch.zeros(3, 9)), TypeError, "input_ids"),
    "3-d ids": (dict(input_ids=torch.zeros(3, 9, 1, dtype=torch.int64)), TypeError, "input_ids"),
    "prompt of another width": (dict(prompt=torch.zeros(5, 23)), ValueError, "lowrank_b"),
    "empty prompt": (dict(prompt=torch.zeros(0, 24)), ValueError, "prompt"),
    "A without B": (dict(lowrank_b=None), ValueError, "lowrank_b"),
    "U without V": (dict(space_up=None), ValueError, "space_up"),
    "D without W": (dict(token_up=None), ValueError, "token_up"),
    "B of another rank": (dict(lowrank_b=torch.zeros(4, 24)), ValueError, "lowrank_b"),
    "V of another shape": (dict(space_up=torch.zeros(4, 3, 24)), ValueError, "space_up"),
    "G of another shape": (dict(gate_weight=torch.zeros(3, 24)), ValueError, "gate_weight"),
    "W of another shape": (dict(token_up=torch.zeros(2, 24)), ValueError, "token_up"),
    "integer parameter": (dict(prompt=torch.zeros(5, 24, dtype=torch.int64)), TypeError, "prompt"),
    "prompt_start beyond the text": (dict(prompt_start=10), ValueError, "prompt_start=10"),
    "negative prompt_start": (dict(prompt_start=-1), ValueError, "prompt_start=-1"),
    "embed_scale of zero": (dict(embed_scale=0.0), ValueError, "embed_scale"),
    "another device": (dict(gate_weight=torch.zeros(4, 24, device="meta")), ValueError, "gate_weight is on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_or_two_lines(name):
    change, error, words = BAD[name]
    with pytest.raises(error) as caught:
        prompt_embed(**make_case(17) | change)
    assert words in str(caught.value) and len(str(caught.value)) < 250
