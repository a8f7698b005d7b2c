"""`aclip export` as a user runs it: where it goes, what it is checked on, what the model card says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from aclip import exporters, models
from aclip.cli import main
from aclip.config import to_dict
from aclip.recipes import RECIPES


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a finished run of a-clip leaves, with pictures to check an export on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "held" / f"{number}.png")
        (tmp_path / "held" / f"{number}.txt").write_text(f"picture {number}\n")
    torch.manual_seed(0)
    model = models.create_model("vit-micro")
    folder = tmp_path / "runs" / "first"
    exporters.open_clip.save(model, models.model_config("vit-micro"), models.preprocess_config(model),
                          models.tokenizer_of("vit-micro"), folder / "final")
    average = {f"method/ema_visual.{name}": 2 * tensor for name, tensor in model.visual.state_dict().items()}
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    save_file(average, folder / "checkpoints" / "step-00000007" / "state.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "recipe": to_dict(RECIPES["a-clip"]), "model": "vit-micro", "data": ["gone.csv", "more.csv"],
        "validation": ["held=held"], "num_pairs": 12720, "batch_size": 64, "seed": 3, "epochs": 2.0,
        "command": "aclip train --data gone.csv more.csv", "versions": {"torch": "2.14"}}))
    (folder / "metrics.jsonl").write_text('{"step": 7, "samples_seen": 448}\n')
    records = [{"step": step, "weights": weights, "evaluator": "retrieval", "set": "held",
                "metrics": {"image_to_text_r1": value}}
               for step, weights, value in ((3, "online", 0.11), (7, "online", 0.25), (7, "ema", 0.31))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_is_exported_beside_itself_with_a_card(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/first", "--to", "safetensors"]) == 0
    said = capsys.readouterr().out
    assert "image features 0.0e+00, text features 0.0e+00" in said
    assert "(on 3 pictures of held=held with their captions, 10 more captions)" in said
    assert "done. safetensors: runs/first/export/safetensors" in said
    card = (run / "export" / "safetensors" / "README.md").read_text()
    for fact in ("# first", "recipe `a-clip`", "arXiv 2212.08653", "`gone.csv`, `more.csv`", "12,720", "| steps | 7 |",
                 "| pairs seen | 448 |", "aclip train --data gone.csv more.csv", '"mask_ratio": 0.5', "torch 2.14",
                 "| held | retrieval | image_to_text_r1 | 0.25 | 7 |", "Mean (0.485, 0.456, 0.406)",
                 "standard deviation (0.229, 0.224, 0.225)", "32 x 32 pixels", "image features | 0.0e+00",
                 "## Licence"):
        assert fact in card, fact
    assert "0.11" not in card
    assert "0.31" not in card
    record = json.loads((run / "export" / "safetensors" / "aclip_export.json").read_text())
    assert record["parity"]["image"] == 0.0


def test_the_moving_average_is_exported_with_its_own_metrics(run: Path) -> None:
    assert main(["export", str(run), "--to", "safetensors", "--weights", "ema", "--output", "out"]) == 0
    online = load_file(run / "final" / "open_clip_model.safetensors")
    for name, tensor in load_file(Path("out") / "model.safetensors").items():
        assert torch.equal(tensor, 2 * online[name] if name.startswith("visual.") else online[name])
    card = (Path("out") / "README.md").read_text()
    assert "moving average" in card
    assert "| held | retrieval | image_to_text_r1 | 0.31 | 7 |" in card


def test_without_its_data_a_run_is_checked_on_made_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path("held").iterdir():
        path.unlink()
    assert main(["export", str(run), "--to", "open_clip"]) == 0
    assert "(on 4 made pictures, 10 captions)" in capsys.readouterr().out
    assert main(["evaluate", str(run / "export" / "open_clip"), "--data", "absent.csv"]) == 1  # it is a model to us too


def test_what_is_no_run_is_exported_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "vit-micro", "--to", "safetensors"]) == 0
    assert "done. safetensors: exports/vit-micro-safetensors" in capsys.readouterr().out
    card = Path("exports/vit-micro-safetensors/README.md").read_text()
    assert "## Training" not in card
    assert "The licence of the weights that were exported applies" in card


@pytest.mark.parametrize(("more", "code", "sentence"), [
    (["--to", "hugingface"], 2, "did you mean 'huggingface'"),
    (["--to", "onnx", "--tolerance", "0"], 2, "--tolerance is a positive number"),
    (["--to", "safetensors", "--output", "held"], 2, "held exists and is no earlier export"),
    (["--to", "huggingface", "--tolerance", "1e-30"], 1, "nothing was written"),
])
def test_errors_are_one_sentence_and_leave_nothing(
    more: list[str], code: int, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), *more]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0
    assert not (run / "export").exists()
