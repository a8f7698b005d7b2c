"""The names of CLIP's weights: against transformers' own model, in both directions."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from tower_oracles import images, shake
from transformers import CLIPConfig, CLIPModel

from aclip.errors import UnsupportedModelError
from aclip.models.hugging_face import to_hugging_face, to_open_clip

VISION = {"layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 24, "mlp_ratio": 2.0}
TEXT = {"context_length": 16, "width": 32, "heads": 4, "layers": 2, "vocab_size": 49408, "mlp_ratio": 2.0}
CONFIG = {
    "projection_dim": 24,
    "vision_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "image_size": 24, "patch_size": 8, "hidden_act": "gelu"},
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "max_position_embeddings": 16, "vocab_size": 49408, "eos_token_id": 49407, "hidden_act": "gelu"},
}


def open_clip_model(cls=CLIP, vision=None, text=None):
    torch.manual_seed(0)
    return shake(cls(24, CLIPVisionCfg(**VISION | (vision or {})), CLIPTextCfg(**TEXT | (text or {})))).eval()


@pytest.mark.parametrize("model", [
    open_clip_model(),
    open_clip_model(CustomTextCLIP),
    open_clip_model(CustomTextCLIP, text={"proj_type": "linear", "proj_bias": False}),
    open_clip_model(vision={"ls_init_value": 0.3}, text={"ls_init_value": 0.2}),
], ids=["CLIP", "separate text", "linear projection", "layer scale"])
@torch.no_grad()
def test_clip_model_computes_open_clips_features_from_its_weights(model):
    theirs = CLIPModel(CLIPConfig(**CONFIG)).eval()
    theirs.load_state_dict(to_hugging_face(model.state_dict()))
    pixels, tokens = images(2, (24, 24)), torch.tensor([[8, 3, 49407] + 13 * [0], [8, 49407] + 14 * [0]])
    torch.testing.assert_close(theirs.get_image_features(pixels).pooler_output, model.encode_image(pixels),
                               rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.get_text_features(tokens).pooler_output, model.encode_text(tokens),
                               rtol=0, atol=1e-5)


def test_both_directions_undo_each_other():
    state = open_clip_model().state_dict()
    back = to_open_clip(to_hugging_face(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    theirs = CLIPModel(CLIPConfig(**CONFIG)).state_dict()
    again = to_hugging_face(to_open_clip(theirs))
    assert all(torch.equal(again[name], theirs[name]) for name in again)
    assert theirs.keys() - again.keys() <= {"text_model.embeddings.position_ids",
                                            "vision_model.embeddings.position_ids"}


def test_tensors_without_a_place_are_named():
    with pytest.raises(UnsupportedModelError, match=r"no place for the tensor visual\.trunk\.cls_token"):
        to_hugging_face({"visual.trunk.cls_token": torch.zeros(1)})
    with pytest.raises(UnsupportedModelError, match=r"no place for the tensor transformer\.resblocks\.0\.attn\.q_norm"):
        to_hugging_face({"transformer.resblocks.0.attn.q_norm.weight": torch.zeros(1)})
