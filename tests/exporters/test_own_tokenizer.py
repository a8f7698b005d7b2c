"""A tokenizer that open_clip does not bundle (SigLIP's, a multilingual CLIP's) is exported with its model."""

import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_models import TINY, changed, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from aclip import models
from aclip.exporters import EXPORTERS
from aclip.exporters.base import write_checked

WORDS = ["<pad>", "<s>", "</s>", "?", "eine", "katze", "zwei", "hunde"]
TEXTS = ["eine katze", "zwei hunde und noch mehr", ""]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """The config of a model whose words are German, with the tokenizer in a folder."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = tmp_path / "german"
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                            unk_token="?").save_pretrained(folder)
    return changed(custom_text=True) | {"text_cfg": TINY["text_cfg"] | {
        "vocab_size": len(WORDS), "hf_tokenizer_name": str(folder), "pool_type": "eos", "eos_id": 2}}


def test_open_clip_loads_it_from_the_exported_folder(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(config)
    tokens = model.tokenizer(TEXTS)
    assert tokens[0, :5].tolist() == [1, 4, 5, 2, 0]
    write_checked(EXPORTERS["open_clip"], model, config, tmp_path / "out")
    shutil.rmtree(tmp_path / "german")  # as on another machine
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(TEXTS), tokens)
    assert torch.equal(models.load(tmp_path / "out").tokenizer(TEXTS), tokens)


def test_the_code_on_the_card_of_an_onnx_export_runs(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(config)
    write_checked(EXPORTERS["onnx"], model, config, tmp_path / "out")
    names: dict[str, Any] = {"pixels": torch.zeros(1, 3, 24, 24).numpy()}
    exec(EXPORTERS["onnx"].usage(model).replace("FOLDER", str(tmp_path / "out")).replace("a cat", TEXTS[0]), names)
    texts = model.encode_text(model.tokenizer([TEXTS[0], "two dogs"])).detach()
    torch.testing.assert_close(torch.as_tensor(names["text_features"]), texts, rtol=0, atol=1e-5)
