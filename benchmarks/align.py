"""Pair the image tower of a run with public text vectors, for `aclip train --recipe align`.

    pip install --no-deps wordllama
    python benchmarks/align.py runs/first pair
    aclip train --recipe align --model pair --data emoji:train --validation emoji:val_vendor --output runs/aligned

WordLlama is a table of vectors of 32,000 tokens, whose mean says what a sentence is about; `align` learns a hidden
layer on it, and the image tower's projection.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from open_clip import create_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from aclip import models

CONSTANT = 1e6
"""BERT's layer norm divides by the root of a vector's variance, here below 10, and this; its weight is the root of
this. So all that it does is to subtract a vector's mean."""


def main() -> None:
    """Write the text tower as a Hugging Face folder, then the model with both towers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="MODEL of whose image tower is taken")
    parser.add_argument("folder", type=Path, help="where the pair is written")
    args = parser.parse_args()

    found = find_spec("wordllama")  # not imported: it would want more packages
    if found is None or not found.submodule_search_locations:
        sys.exit("wordllama is missing: pip install --no-deps wordllama")
    package, words = Path(found.submodule_search_locations[0]), args.folder / "words"
    table = load_file(package / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].float()
    PreTrainedTokenizerFast(tokenizer_file=str(package / "tokenizers" / "l2_supercat_tokenizer_config.json"),
                            pad_token="<unk>").save_pretrained(words)
    text = BertModel(BertConfig(vocab_size=len(table), hidden_size=table.shape[1], num_hidden_layers=0, pad_token_id=0,
                                layer_norm_eps=CONSTANT, hidden_dropout_prob=0.0), add_pooling_layer=False)
    with torch.no_grad():
        text.embeddings.word_embeddings.weight.copy_(table)
        text.embeddings.position_embeddings.weight.zero_()
        text.embeddings.token_type_embeddings.weight.zero_()
        text.embeddings.LayerNorm.weight.fill_(CONSTANT**0.5)
    text.save_pretrained(words)

    trained: Any = models.create_model(args.run)
    config: dict[str, Any] = models.model_config(args.run)
    config["text_cfg"] = {"hf_model_name": str(words), "hf_tokenizer_name": str(words), "hf_pooler_type": "mean_pooler",
                          "hf_proj_type": "mlp", "context_length": 77}
    (args.folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": config, "preprocess_cfg": models.preprocess_config(trained)}))
    pair: Any = create_model(f"local-dir:{args.folder}", load_weights=False)
    pair.visual.load_state_dict(trained.visual.state_dict())
    save_file(pair.state_dict(), args.folder / "open_clip_model.safetensors")


if __name__ == "__main__":
    main()
