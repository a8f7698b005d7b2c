import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from tower_oracles import assert_same_gradients, fresh_model, gradients, shake

from aclip import models
from aclip.errors import UnsupportedModelError
from aclip.models import text as text_module

CAPTIONS = ["a cat", "", "a red heart with an arrow, love", "日本の旗 🇯🇵", "it's 3 o'clock!"]


@pytest.fixture(scope="module")
def model():
    return fresh_model("vit-tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer_of("vit-tiny")


def custom_text_model(**text):
    """Build a model that keeps its text tower apart (`model.text`)."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=32, patch_size=8, image_size=8)
    options = {"context_length": 16, "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408, **text}
    return shake(CustomTextCLIP(24, vision, CLIPTextCfg(**options))).eval()


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def packed(request, monkeypatch):
    """Run with and without padding; an accelerator pads."""
    monkeypatch.setattr(text_module, "packs", lambda tokens: request.param)
    return request.param


def test_cut_text_has_the_features_and_gradients_of_open_clip_at_full_context(model, tokenizer, packed):
    tokens = tokenizer(CAPTIONS)
    cut = models.cut_after_eot(tokens)
    assert cut.shape[1] < tokens.shape[1] == 77
    ours, theirs = models.encode_text(model, cut), model.encode_text(tokens)
    torch.testing.assert_close(F.normalize(ours), F.normalize(theirs), rtol=0, atol=1e-6)
    torch.testing.assert_close(models.encode_text(model, tokens), theirs, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, ours), gradients(model, theirs))


def test_packed_text_has_the_gradients_of_padded_text_when_blocks_are_run_again(model, tokenizer, monkeypatch):
    tokens = tokenizer(CAPTIONS)
    found = []
    for packs in (True, False):
        monkeypatch.setattr(text_module, "packs", lambda tokens, packs=packs: packs)
        model.transformer.grad_checkpointing = packs
        found.append(gradients(model, models.encode_text(model, tokens)))
    assert not model.transformer.grad_checkpointing
    assert_same_gradients(*found)


def test_blocks_compute_no_padding(model, tokenizer):
    tokens = models.cut_after_eot(tokenizer(CAPTIONS))
    seen = []
    hook = model.transformer.resblocks[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    models.encode_text(model, tokens)
    hook.remove()
    assert seen == [(int((tokens.argmax(dim=1) + 1).sum()), 192)]
    assert text_module.packs(tokens)
    assert not text_module.packs(tokens.to("meta"))


def test_features_do_not_depend_on_the_other_captions(model, tokenizer, packed):
    tokens = tokenizer(CAPTIONS)
    together = models.encode_text(model, models.cut_after_eot(tokens))
    for index in range(len(CAPTIONS)):
        alone = models.encode_text(model, models.cut_after_eot(tokens[index:index + 1]))
        torch.testing.assert_close(together[index:index + 1], alone, rtol=0, atol=1e-5)


def test_long_captions_keep_their_eot_and_stay_apart(model, tokenizer):
    long = ["a dog " * 500, "a cat " * 500, "word " * 10_000]
    tokens = tokenizer(long)
    assert tokens.shape == (3, 77)
    assert (tokens[:, -1] == 49407).all()
    assert (tokens.argmax(dim=1) == 76).all()
    features = F.normalize(models.encode_text(model, models.cut_after_eot(tokens)))
    assert (features @ features.T).fill_diagonal_(0).max() < 0.999


def test_cut_ends_with_the_longest_captions_eot():
    tokens = torch.tensor([[8, 3, 9, 0, 0, 0], [8, 3, 4, 9, 0, 0], [8, 9, 0, 9, 0, 0]])
    assert torch.equal(models.cut_after_eot(tokens), tokens[:, :4])
    assert torch.equal(models.cut_after_eot(tokens[2:]), tokens[2:, :2])  # the first EOT is read
    full = torch.tensor([[8, 3, 9]])
    assert torch.equal(models.cut_after_eot(full), full)


@pytest.mark.parametrize("text", [{}, {"proj_bias": True}, {"proj_type": "none"}, {"ls_init_value": 0.2}])
def test_separate_text_towers_are_cut_too(text):
    model = custom_text_model(**text)
    tokens = torch.tensor([[8, 3, 9], [8, 9, 0]])
    full = F.pad(tokens, (0, 13))
    assert models.can_cut(model)
    torch.testing.assert_close(models.encode_text(model, tokens), model.encode_text(full), rtol=0, atol=1e-5)


UNCUTTABLE = [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "eos", "eos_id": 9},
              {"embed_cls": True}, {"qk_norm": True}]


@pytest.mark.parametrize("text", UNCUTTABLE, ids=str)
def test_other_text_towers_run_at_full_context_only(text):
    model = custom_text_model(**text)
    assert not models.can_cut(model)
    tokens = F.pad(torch.tensor([[8, 3, 9], [8, 9, 0]]), (0, 13))
    assert torch.equal(models.encode_text(model, tokens), model.encode_text(tokens))
    with pytest.raises(ValueError, match="reads exactly 16 tokens, not 3"):
        models.encode_text(model, tokens[:, :3])


def test_text_beyond_the_context_is_refused(model):
    with pytest.raises(ValueError, match="78 tokens are more than the text tower's context of 77"):
        models.encode_text(model, torch.ones(1, 78, dtype=torch.int64))


def test_models_without_text_say_so(model):
    image_only = models.ImageTower(model.visual)
    tokens = torch.ones(1, 2, dtype=torch.int64)
    for use in (models.logit_scale_of, models.can_cut, lambda m: models.encode_text(m, tokens)):
        with pytest.raises(UnsupportedModelError, match="has an image tower only"):
            use(image_only)
    assert models.logit_scale_of(model) is model.logit_scale


def test_half_precision_text_is_close(model, tokenizer):
    tokens = models.cut_after_eot(tokenizer(CAPTIONS))
    exact = models.encode_text(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = models.encode_text(model, tokens)
    assert F.cosine_similarity(half.float(), exact).min() > 0.999
    expected, rough = gradients(model, exact), gradients(model, half.float())
    flat = [torch.cat([g[name].flatten() for name in expected]) for g in (rough, expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.998


def literal_hidden_states(model, tokens, hidden, mask_token):
    """Caption by caption, token by token, then open_clip's own transformer under its causal mask."""
    states = []
    for caption, is_hidden in zip(tokens, hidden, strict=True):
        x = torch.stack([
            (mask_token if is_hidden[i] else model.token_embedding.weight[token]) + model.positional_embedding[i]
            for i, token in enumerate(caption)
        ])
        x = model.transformer(x[None], attn_mask=model.attn_mask[: len(x), : len(x)])
        states.append(model.ln_final(x)[0])
    return torch.stack(states)


def hide_some(tokens):
    """Return a mask token and where it stands: at the second and fourth words of captions that are that long."""
    place, end = torch.arange(tokens.shape[1]), tokens.argmax(dim=1, keepdim=True)
    hidden = ((place == 2) | (place == 4)) & (place < end)
    return torch.randn(192, generator=torch.Generator().manual_seed(5)), hidden


def test_hidden_text_equals_open_clip_with_other_embeddings(model, tokenizer):
    tokens = models.cut_after_eot(tokenizer(CAPTIONS))
    mask_token, hidden = hide_some(tokens)
    mask_token.requires_grad_()
    ours = models.encode_hidden_text(model, tokens, hidden, mask_token)
    theirs = literal_hidden_states(model, tokens, hidden, mask_token)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours_by_name, theirs_by_name = {}, {}
    for states, by_name in ((ours, ours_by_name), (theirs, theirs_by_name)):
        mask_token.grad = None
        by_name.update(gradients(model, states))
        by_name["mask_token"] = mask_token.grad.clone()
    assert_same_gradients(ours_by_name, theirs_by_name)
    assert ours_by_name["mask_token"].abs().max() > 0


def test_nothing_hidden_is_the_text_encoder(model, tokenizer):
    tokens = models.cut_after_eot(tokenizer(CAPTIONS))
    states = models.encode_hidden_text(model, tokens, tokens < 0, torch.full((192,), 9.0))
    at_eot = states[torch.arange(len(tokens)), tokens.argmax(dim=1)] @ model.text_projection
    torch.testing.assert_close(at_eot, models.encode_text(model, tokens), rtol=0, atol=1e-5)


def test_a_hidden_token_is_not_seen_and_its_mask_is(model, tokenizer):
    tokens = models.cut_after_eot(tokenizer(CAPTIONS))
    mask_token, hidden = hide_some(tokens)
    states = models.encode_hidden_text(model, tokens, hidden, mask_token)
    other_words = torch.where(hidden, 1234, tokens)
    assert torch.equal(models.encode_hidden_text(model, other_words, hidden, mask_token), states)
    changed = (models.encode_hidden_text(model, tokens, hidden, mask_token + 1) - states).abs().amax(dim=2) > 0
    assert torch.equal(changed, hidden.cumsum(dim=1) > 0)  # causal: from the first hidden token on


def test_tokens_can_be_hidden_in_towers_that_can_be_cut_alone():
    tokens = torch.tensor([[8, 3, 9], [8, 9, 0]])
    hidden, mask_token = tokens == 3, torch.zeros(32)
    assert models.encode_hidden_text(custom_text_model(), tokens, hidden, mask_token).shape == (2, 3, 32)
    with pytest.raises(UnsupportedModelError, match="a causal, EOT-pooled text tower"):
        models.encode_hidden_text(custom_text_model(no_causal_mask=True), tokens, hidden, mask_token)
