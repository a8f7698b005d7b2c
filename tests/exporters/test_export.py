"""`export` as a user calls it: where it writes, what it is checked on, what record and card say."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aclip import checkpoint, models
from aclip.errors import AclipError
from aclip.exporters import EXPORTERS, Exporter, Readback, export
from aclip.exporters import open_clip as exported
from aclip.models import LoadedModel

RECIPE = {"name": "a-clip", "title": "attentive masking", "paper": "arXiv 2212.08653",
          "passes": {"masked": {"masking": {"name": "attentive", "options": {"mask_ratio": 0.5}}}}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a-clip whose journals go on to step 9 after the checkpoint and the model of step 7."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = models.create_model("vit-micro")
    folder = tmp_path / "runs" / "first run"
    exported.save(model, models.model_config("vit-micro"), models.preprocess_config(model),
                  models.tokenizer_of("vit-micro"), folder / "final", step=7, samples_seen=448)
    tensors = {f"method/model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"method/ema_visual.{name}": 2 * tensor for name, tensor in model.visual.state_dict().items()}
    (folder / "checkpoints" / ".new").mkdir(parents=True)
    checkpoint.write_rank_file(folder / "checkpoints" / ".new", checkpoint.own_part(tensors))
    checkpoint.commit(folder / "checkpoints", folder / "checkpoints" / ".new", 7, {"samples_seen": 448})
    (folder / "config.json").write_text(json.dumps({
        "recipe": RECIPE, "model": "vit-micro", "data": ["gone.csv=2", "more.csv=1"],
        "validation": ["held=held"], "num_pairs": 12720, "batch_size": 64, "seed": 3, "epochs": 2.0,
        "command": "aclip train --data 'gone.csv=2' more.csv=1", "versions": {"torch": "2.14"}}))
    (folder / "metrics.jsonl").write_text('{"step": 9, "samples_seen": 576}\n')
    records = [{"step": step, "weights": weights, "evaluator": "retrieval", "set": "held",
                "metrics": {"image_to_text_r1": value}}
               for step, weights, value in ((3, "online", 0.11), (7, "online", 0.25), (7, "ema", 0.31),
                                            (9, "online", 0.43))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_is_exported_with_a_card_and_a_record_of_what_was_loaded(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("runs/first run") == Path("runs/first run/export/open_clip")
    printed = capsys.readouterr().out
    assert printed.startswith("largest difference in open_clip: image features ")
    assert "exported to runs/first run/export/open_clip  model card: " in printed
    assert printed.count("\n") == 2
    folder = run / "export" / "open_clip"
    card = (folder / "README.md").read_text()
    for fact in ("# first run", "recipe `a-clip`", "arXiv 2212.08653", "gone.csv", "12720", "Step 7, 448 samples seen",
                 "aclip train --data 'gone.csv=2' more.csv=1", '"mask_ratio": 0.5',
                 "2.14", "| held | retrieval | image_to_text_r1 | 0.25 | 7 |", "mean 0.485, 0.456, 0.406",
                 "deviation 0.229, 0.224, 0.225", "32 x 32 pixels", "| image features | ", "## Licence",
                 "library_name: open_clip", "pipeline_tag: zero-shot-image-classification"):
        assert fact in card, fact
    for other in ("0.11", "0.31", "0.43", "576"):  # earlier, of other weights, and later than what was loaded
        assert other not in card
    record = json.loads((folder / "aclip_export.json").read_text())
    assert record["differences"]["image features"] < 1e-6
    assert (record["step"], record["samples_seen"], record["weights"]) == (7, 448, "online")
    assert record["command"] == ("aclip export 'runs/first run' --to open_clip --weights online --output "
                                 "'runs/first run/export/open_clip'")
    assert {"step": 7, "samples_seen": 448}.items() <= json.loads((folder / "aclip.json").read_text()).items()


def test_the_moving_average_is_exported_with_its_own_metrics(run: Path) -> None:
    export(str(run), to="open_clip", weights="ema", output="out")
    online = load_file(run / "final" / "open_clip_model.safetensors")
    for name, tensor in load_file(Path("out") / "open_clip_model.safetensors").items():
        assert torch.equal(tensor, 2 * online[name] if name.startswith("visual.") else online[name])
    assert json.loads((Path("out") / "aclip_export.json").read_text())["weights"] == "ema"
    card = (Path("out") / "README.md").read_text()
    assert "exponential moving average" in card
    assert "| held | retrieval | image_to_text_r1 | 0.31 | 7 |" in card


def test_a_model_that_is_not_a_run_is_exported_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export("vit-micro") == Path("exports/vit-micro-open_clip")
    card = Path("exports/vit-micro-open_clip/README.md").read_text()
    assert "## Training" not in card
    assert "The licence of the weights that were exported applies" in card


def test_a_format_of_the_users_own_is_registered_in_the_table(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StateDictExporter(Exporter):
        """The state dict alone, loaded into a new model."""

        library = "torch"

        def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
            torch.save(model.model.state_dict(), folder / "model.pt")

        def read(self, folder: Path, model: LoadedModel) -> Readback:
            fresh = LoadedModel(models.create_model("vit-micro").eval(), model.tokenizer)
            fresh.model.load_state_dict(torch.load(folder / "model.pt"))
            return Readback(fresh.encode_image, fresh.encode_text)

        def usage(self, model: LoadedModel) -> str:
            return 'torch.load("FOLDER/model.pt")'

    monkeypatch.setitem(EXPORTERS, "state-dict", StateDictExporter())
    folder = export(str(run), to="state-dict")
    assert folder == run / "export" / "state-dict"
    assert 'torch.load("FOLDER/model.pt")' in (folder / "README.md").read_text()


def test_a_run_that_was_killed_is_exported_with_the_step_of_its_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "final")
    record = json.loads((export(str(run)) / "aclip_export.json").read_text())
    assert (record["step"], record["samples_seen"]) == (7, 448)


def test_the_command_line_can_read_the_signature_without_torch() -> None:
    code = "import sys, aclip.exporters; sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"to": "hugingface"}, "did you mean 'huggingface'"),
    ({"output": "runs"}, "runs exists and is not an earlier export"),
    ({"to": "huggingface", "tolerance": 1e-30}, "nothing was written"),
])
def test_errors_are_one_sentence_and_leave_nothing(options: dict[str, Any], message: str, run: Path) -> None:
    with pytest.raises(AclipError, match=message) as error:
        export(str(run), **options)
    assert "\n" not in str(error.value)
    assert not list(run.glob("export/*"))
