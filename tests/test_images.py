"""Models of text and images: causal models whose images stand in the place of placeholder tokens."""

import copy

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from ept import EPTModel, get_ept_model
from tiny_models import VOCAB, WIDTH, all_parts, ids, padded, shake, wrapped

IMAGE, START, TOKENS = 119, 117, 4  # the placeholder, what stands before it, and how many there are for one image
CLOSE = dict(rtol=1e-4, atol=1e-5)

_TEXT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_SIGHT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
_QWEN = dict(image_token_id=IMAGE, video_token_id=118, vision_start_token_id=START, vision_end_token_id=116)
_QWEN_SIGHT = dict(
    num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=1, in_channels=3, hidden_size=32, depth=2
)


def _rope(*sections):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)})


def gemma3():
    text = hf.Gemma3TextConfig(
        **_TEXT, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    return hf.Gemma3Config(
        text_config=text.to_dict(), vision_config=hf.SiglipVisionConfig(**_SIGHT).to_dict(), mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE, boi_token_index=START, eoi_token_index=118,
    )  # fmt: skip


def llava():
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_TEXT), vision_config=hf.CLIPVisionConfig(**_SIGHT), image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip


def mistral3():
    return hf.Mistral3Config(
        text_config=hf.MistralConfig(**_TEXT, head_dim=8), vision_config=hf.PixtralVisionConfig(**_SIGHT, head_dim=8),
        image_token_index=IMAGE, spatial_merge_size=1, vision_feature_layer=-1,
    )  # fmt: skip


def qwen2_vl():
    sight = _QWEN_SIGHT | dict(embed_dim=32, mlp_ratio=2)
    return hf.Qwen2VLConfig(text_config=_TEXT | _rope(1, 1, 2), vision_config=sight, **_QWEN)


def qwen3_vl():
    sight = _QWEN_SIGHT | dict(
        intermediate_size=64, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]
    )
    return hf.Qwen3VLConfig(text_config=_TEXT | dict(head_dim=8) | _rope(2, 1, 1), vision_config=sight, **_QWEN)


CONFIGS = {"gemma3": gemma3, "llava": llava, "mistral3": mistral3, "qwen2-vl": qwen2_vl, "qwen3-vl": qwen3_vl}


def backbone(name, auto=hf.AutoModelForImageTextToText):
    torch.manual_seed(0)
    model = auto.from_config(CONFIGS[name]()).eval()
    if name == "gemma3":  # whose pictures come in through a matrix that starts at zero
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def sees(name, **settings):
    return wrapped(backbone(name), all_parts(**settings))


def image(name, seed=0):
    """What the model takes beside text with one image."""
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    if name.startswith("qwen"):  # twice as high and wide, since four patches make a token
        pixels = torch.randn(16, 48, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"pixel_values": pixels} | ({"image_sizes": torch.tensor([[8, 8]])} if name == "mistral3" else {})


def types(name, text):
    """Which tokens are an image's, where the model asks for it."""
    is_image = (text == IMAGE).long()
    if name == "gemma3":
        return {"token_type_ids": is_image}
    return {"mm_token_type_ids": is_image} if name.startswith("qwen") else {}


def with_image(before=3, after=4, seed=1):
    """[1, n] text with an image in it."""
    middle = torch.tensor([[START, *[IMAGE] * TOKENS]])
    return torch.cat([ids(1, before, seed=seed) % 100, middle, ids(1, after, seed=seed + 1) % 100], 1)


def plain(length=5, seed=5):
    return ids(1, length, seed=seed) % 100


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("deep_layers", [0, -1])
def test_text_and_images_give_the_same_logits_however_rows_are_padded_and_the_loss_is_the_causal_one(name, deep_layers):
    model = sees(name, deep_layers=deep_layers)
    assert model.traits.kind.name == "causal"
    seen, text, picture = with_image(), plain(), image(name)
    with torch.no_grad():
        alone = model(seen, labels=seen, **types(name, seen), **picture)
        torch.testing.assert_close(alone.loss, F.cross_entropy(alone.logits[0, :-1], seen[0, 1:]))
        without = model(text, labels=text).logits[0]
        for side in ("left", "right"):
            batch, mask = padded([seen, text], side)
            out = model(batch, mask, **types(name, batch), **picture).logits
            torch.testing.assert_close(out[0], alone.logits[0], **CLOSE)
            torch.testing.assert_close(out[1][mask[1] == 1], without, **CLOSE)
        other = model(seen, **types(name, seen), **image(name, seed=9)).logits
        assert (other - alone.logits).abs().max() > 1e-4  # the picture is seen


@pytest.mark.parametrize("name", CONFIGS)
def test_placeholders_and_pictures_come_to_the_language_model_as_they_are(name):
    model, seen = sees(name), with_image()
    language, read = model.base_model.get_decoder(), []
    language.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs), with_kwargs=True)
    arguments = types(name, seen) | image(name)
    with torch.no_grad():
        with model.disable_adapter():
            model(seen, **arguments)
        model(seen, **arguments)
    (bare, ours), s = (each["inputs_embeds"][0] for each in read), 5
    is_image = seen[0] == IMAGE
    assert torch.equal(ours[s:][is_image], bare[is_image])
    assert ((ours[s:] - bare)[~is_image].abs().amax(1) > 1e-5).all()  # the words are updated
    if name.startswith("qwen"):
        bare, ours = (each["position_ids"] for each in read)
        assert torch.equal(ours[-3:, 0, s:], bare[-3:, 0] + s) and ours[-3:, 0, s:].unique(dim=0).shape[0] > 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}])
def test_generation_is_the_teacher_forced_argmax_beside_images(name, settings):
    model, seen, text, picture = sees(name, deep_layers=-1), with_image(), plain(), image(name)
    batch, mask = padded([seen, text], "left")
    greedy = dict(max_new_tokens=3, do_sample=False) | settings
    written = model.generate(batch, mask, **types(name, batch), **picture, **greedy)
    longer, new = torch.cat([mask, mask.new_ones(2, 3)], 1), batch.shape[1]
    told = types(name, torch.cat([batch, torch.zeros(2, 3, dtype=torch.int64)], 1))
    with torch.no_grad():
        logits = model(written, longer, **told, **picture).logits
    assert torch.equal(logits[:, new - 1 : -1].argmax(-1), written[:, new:])
    assert torch.equal(model.generate(text, **greedy)[0, 5:], written[1, new:])
    if settings:
        return
    beams = dict(num_beams=2, num_return_sequences=2)
    together = model.generate(batch, mask, **types(name, batch), **picture, **greedy, **beams)
    assert torch.equal(
        together[:2, new:], model.generate(seen, **types(name, seen), **picture, **greedy, **beams)[:, new:]
    )
    assert torch.equal(together[2:, new:], model.generate(text, **greedy, **beams)[:, 5:])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_turn_on_a_cache_that_holds_an_image_is_that_of_a_fresh_one(name):
    model, seen, picture = sees(name), with_image(), image(name)
    greedy = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    first = model.generate(seen, **types(name, seen), **picture, **greedy)
    whole = torch.cat([first.sequences, plain(3)], 1)
    told = types(name, torch.cat([seen, torch.zeros(1, 6, dtype=torch.int64)], 1))
    want = model.generate(whole, **told, **picture, **greedy).sequences
    later = {key: value for key, value in picture.items() if key == "image_grid_thw"}  # the picture is in the cache
    cache = first.past_key_values
    assert torch.equal(model.generate(whole, **told, **later, past_key_values=cache, **greedy).sequences, want)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_of_several_adapters_see_their_images(name):
    model, picture = sees(name), image(name)
    model.add_adapter("b", all_parts(prompt_length=3))
    shake(type("Holder", (), {"ept": model.inactive_adapters[0].layer}), seed=7)
    rows, names = [with_image(), plain()], ["b", "default"]
    batch, mask = padded(rows, "left")
    with torch.no_grad():
        out = model(batch, mask, adapter_ids=names, **types(name, batch), **picture).logits
        for i, row in enumerate(rows):
            own = picture if i == 0 else {}
            want = model(row, adapter_ids=[names[i]], **types(name, row), **own).logits[0]
            torch.testing.assert_close(out[i][mask[i] == 1], want, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_beside_images_moves_the_adapter_and_saves(name, tmp_path):
    model, seen = sees(name, deep_layers=-1).train(), with_image()
    arguments = dict(labels=seen) | types(name, seen) | image(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(seen, **arguments).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.ept.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(backbone(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(seen, **arguments).logits, model(seen, **arguments).logits)


def test_a_prefix_that_sees_both_ways_does_not_see_padding():
    torch.manual_seed(0)
    sight = hf.SiglipVisionConfig(**_SIGHT, projection_dim=32)
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**_TEXT, head_dim=8), vision_config=sight, image_token_index=IMAGE, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    model, rows = wrapped(hf.PaliGemmaForConditionalGeneration(config).eval()), [plain(9), plain(4, seed=6)]
    batch, mask = padded(rows, "left")
    with torch.no_grad():
        out = model(batch, mask).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(out[i][mask[i] == 1], model(row).logits[0], **CLOSE)


def test_a_backbone_whose_images_bring_columns_of_their_own_is_right_on_text_and_refuses_images():
    torch.manual_seed(0)
    base = hf.GitForCausalLM(hf.GitConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, vision_config=_SIGHT | dict(num_hidden_layers=9),
    )).eval()  # fmt: skip
    model, text = wrapped(base, all_parts(deep_layers=-1)), plain()
    assert model.ept_config.deep_layers == 2  # the text's, not those that see
    with torch.no_grad():
        assert model(text).logits.shape == (1, 5, VOCAB)
        with pytest.raises(ValueError, match="images bring columns of their own"):
            model(text, pixel_values=torch.randn(1, 3, 8, 8))


def test_a_prompt_never_starts_from_a_placeholder():
    base = backbone("llava")
    row = base.get_input_embeddings().weight[IMAGE]
    for seed in range(3):
        torch.manual_seed(seed)
        model = get_ept_model(base, all_parts(prompt_length=VOCAB))  # longer than the vocabulary that is drawn from
        assert (model.ept.reconstruct()[0] - row).abs().amax(1).min() > 1e-3


def test_positions_in_images_do_not_come_from_an_earlier_call():
    model, seen, text = sees("qwen2-vl"), with_image(), plain()
    with torch.no_grad():
        want = model(text).logits
        copy.deepcopy(model)(text)
        model(seen, **types("qwen2-vl", seen), **image("qwen2-vl"))
        model.generate(seen, **types("qwen2-vl", seen), **image("qwen2-vl"), max_new_tokens=2)
        assert torch.equal(model(text).logits, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mm_token_type_ids=None), "images need mm_token_type_ids"),
        (dict(image_grid_thw=None, pixel_values=None), "give image_grid_thw"),
        (dict(position_ids=torch.arange(12)[None]), "leave inputs_embeds and position_ids out"),
        (dict(position_ids=torch.tensor([[*range(8), *range(4)]])), "one example a row"),
    ],
)
def test_positions_in_images_that_cannot_be_known_are_refused(change, words):
    seen = with_image()
    arguments = types("qwen2-vl", seen) | image("qwen2-vl") | change
    with pytest.raises(ValueError, match=words):
        sees("qwen2-vl")(seen, **{name: value for name, value in arguments.items() if value is not None})
