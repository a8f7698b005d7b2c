"""A tokenizer that open_clip does not bundle (SigLIP's, a multilingual CLIP's) goes where the model goes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from exported_models import TINY, changed, make_subject
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from aclip import models
from aclip.cli import main
from aclip.exporters import EXPORTS, Subject, made_examples, write_checked

WORDS = ["<pad>", "<s>", "</s>", "?", "eine", "katze", "zwei", "hunde"]
TEXTS = ["eine katze", "zwei hunde und noch mehr", ""]


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A model on disk whose words are German, with the tokenizer in the same folder."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = tmp_path / "german"
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                            unk_token="?").save_pretrained(folder)
    text = TINY["text_cfg"] | {"vocab_size": len(WORDS), "hf_tokenizer_name": str(folder), "pool_type": "eos",
                               "eos_id": 2}
    config = changed(custom_text=True) | {"text_cfg": text}
    made = make_subject(config)
    EXPORTS["open_clip"].write(made, folder)
    return made


def test_it_is_handed_over_with_the_model(subject: Subject, tmp_path: Path) -> None:
    tokens = subject.model.tokenizer(TEXTS)
    assert tokens[0, :5].tolist() == [1, 4, 5, 2, 0]
    parity = write_checked(EXPORTS["open_clip"], subject, tmp_path / "out", made_examples((24, 24)),
                           card=lambda parity: "")
    assert parity.captions > 0
    shutil.rmtree(tmp_path / "german")  # as on another machine
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(TEXTS), tokens)
    assert torch.equal(models.load(tmp_path / "out").tokenizer(TEXTS), tokens)


def test_what_the_card_of_an_onnx_export_shows_runs(subject: Subject, tmp_path: Path) -> None:
    write_checked(EXPORTS["onnx"], subject, tmp_path / "out", made_examples((24, 24)), card=lambda parity: "")
    names: dict[str, Any] = {"pixels": torch.zeros(1, 3, 24, 24).numpy()}
    exec(EXPORTS["onnx"].usage(subject).replace("FOLDER", str(tmp_path / "out")).replace("a cat", TEXTS[0]), names)
    texts = subject.model.encode_text(subject.model.tokenizer([TEXTS[0], "two dogs"])).detach()
    torch.testing.assert_close(torch.as_tensor(names["text_features"]), texts, rtol=0, atol=1e-5)


def test_a_run_ends_with_it(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(TEXTS[number % 2])
    status = main(["train", "--recipe", "clip", "--model", "german", "--data", "pictures", "--epochs", "1",
                   "--batch-size", "4", "--workers", "0", "--device", "cpu", "--output", "run"])
    assert status == 0
    tokens = subject.model.tokenizer(TEXTS)
    shutil.rmtree(tmp_path / "german")
    assert json.loads((tmp_path / "run" / "final" / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"
    assert torch.equal(models.load(tmp_path / "run").tokenizer(TEXTS), tokens)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'run' / 'final'}")(TEXTS), tokens)
