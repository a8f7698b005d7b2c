"""`aclip train` as a user runs it: to the end, through a kill, on bad data; and what it leaves behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import aclip
from aclip import dist
from aclip.cli import main
from aclip.config import CHANGEABLE
from bad_samples import USED, check_skipped, make_mixed_folder
from made_pictures import captioned_noise

SMALL = ("--model", "vit-tiny", "--precision", "fp32", "--log-every", "1",
         "--recipe.objectives.ntxent.options.hidden", "32", "--recipe.objectives.byol.options.hidden", "32")
TIMINGS = ("samples_per_second", "data_wait")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy images with captions, of different sizes."""
    return captioned_noise(tmp_path_factory.mktemp("images"), [(40 + number, 60) for number in range(24)])


def options(images: Path, output: Path, *more: str) -> list[str]:
    """Evaluate and save after every third step, of which the 24 images make an epoch."""
    return ["train", "--data", str(images), "--output", str(output), "--batch-size", "8", "--evaluate-every", "0.3",
            "--save-every", "0.3", *SMALL, *more]


def in_another_process(arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "aclip", *arguments], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def journal(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def without_timings(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six epochs with two loader workers."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = in_another_process(options(images, run, "--epochs", "6", "--workers", "2", "--validation",
                                         f"held={images}"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return run


def test_leaves_everything_that_is_promised(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["name"] == "a-clip-muon"
    assert config["batch_size"] == 8
    records = journal(finished)
    assert [r["step"] for r in records] == list(range(1, 19))
    assert all(r["samples_seen"] == 8 * r["step"] for r in records)
    for key in ("loss", "parts", "lr", "logit_scale", "ema_momentum", "samples_per_second", "data_wait"):
        assert key in records[0], key
    assert {r["set"] for r in journal(finished, "evaluations")} == {"held"}
    trained = json.loads((finished / "final" / "aclip.json").read_text())
    assert {"step": 18, "samples_seen": 144}.items() <= trained.items()
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-00000015", "step-00000018"]
    assert "<html" in (finished / "report.html").read_text()


def test_model_loads_in_open_clip_and_gives_the_same_features(finished: Path) -> None:
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{finished / 'final'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{finished / 'final'}")
    ours = aclip.load(finished)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    torch.testing.assert_close(preprocess(picture), ours.preprocess(picture))
    pixels, tokens = preprocess(picture)[None], tokenizer(["noise number 3", "a long caption " * 40])
    assert torch.equal(tokens, ours.tokenizer(["noise number 3", "a long caption " * 40]))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(pixels), theirs.eval().encode_image(pixels, normalize=True),
                                   rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens, normalize=True),
                                   rtol=0, atol=1e-5)


def test_a_killed_run_resumes_to_the_same_numbers(finished: Path, images: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment; then every metric but the timings equals the uninterrupted run's."""
    run = tmp_path / "killed"
    chance = random.Random()  # a new moment every time: any moment must do
    last_words = chance.randint(4, 15)
    process = in_another_process(options(images, run, "--epochs", "6", "--workers", "2", "--validation",
                                         f"held={images}"))
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= last_words:
                break
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9999, "loss": 1.0}\n{"step": 99')  # lines after the checkpoint, the last one torn
    resumed = in_another_process(["train", "--resume", str(run)])
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors.decode()
    assert without_timings(journal(run)) == without_timings(journal(finished))
    assert journal(run, "evaluations") == journal(finished, "evaluations")
    ours, theirs = aclip.load(run).state_dict(), aclip.load(finished).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interrupted_run_saves_itself(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "interrupted"
    process = in_another_process(options(images, run, "--epochs", "1000", "--save-every", "0", "--workers", "1"))
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "continue with aclip train --resume" in errors.decode()
    saved = int((next((run / "checkpoints").glob("step-*"))).name.removeprefix("step-"))
    assert saved == journal(run)[-1]["step"]


def test_ema_weights_can_be_evaluated(finished: Path, images: Path) -> None:
    before = len(journal(finished, "evaluations"))
    assert main(["evaluate", str(finished), "--data", f"held={images}", "--weights", "ema", "--workers", "0"]) == 0
    assert [r["weights"] for r in journal(finished, "evaluations")[before:]] == ["ema"]


def test_zero_shot_takes_classes_and_templates(
    finished: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"noise number {number}\n" for number in range(30)))
    arguments = ["evaluate", str(finished), "--data", f"held={images}", "--evaluators", "zero_shot", "--workers", "0",
                 "--classes", str(names)]
    assert main([*arguments, "--templates", "this is {}", "{}"]) == 0
    record = journal(finished, "evaluations")[-1]
    assert record["evaluator"] == "zero_shot"
    assert record["counts"]["classes"] == 30
    assert main([*arguments, "--templates", "no slot"]) == 2
    assert "no slot" in capsys.readouterr().err


def test_any_field_can_be_set_and_a_typo_is_explained(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(images, tmp_path / "run", "--recipe.passes.maskd.mask_ratio", "0.75")
    assert main(arguments) == 2
    assert "did you mean 'masked'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--data", "/nowhere/at/all.csv"], "/nowhere/at/all.csv"),
    (["--recipe", "aclip"], "did you mean 'a-clip'"),
    (["--model", "ViT-B-61"], "did you mean 'ViT-B-16'"),
    (["--batch-size", "25"], "fewer than one batch of 25"),
    (["--mask-ratio", "1.5"], "mask_ratio should be less than 1, not 1.5"),
    (["--recipe", "clip", "--mask-ratio", "0.5"], "masks nothing"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available"),
])
def test_wrong_usage_is_one_sentence(
    arguments: list[str], sentence: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["train", "--data", str(images), "--output", str(tmp_path / "run"), *arguments]
    assert main(plain) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_a_second_run_does_not_overwrite_the_first(
    finished: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank says so before they meet, where the others would wait for one that has failed alone."""
    monkeypatch.setattr(dist, "joined", lambda device: pytest.fail("the ranks have met"))
    assert main(options(images, finished)) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resuming_another_recipe_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "other"
    (run / "checkpoints").mkdir(parents=True)
    config = json.loads((finished / "config.json").read_text())
    config["recipe"] = json.loads(json.dumps(config["recipe"]).replace('"hidden": 32', '"hidden": 48'))
    (run / "config.json").write_text(json.dumps(config))
    os.symlink(finished / "checkpoints" / "step-00000018", run / "checkpoints" / "step-00000018")
    assert main(["train", "--resume", str(run)]) == 1
    assert "has shape [32" in capsys.readouterr().err


def test_a_folder_of_bad_samples_trains_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred good pairs, six unusual ones that are used, six bad ones that are skipped and named."""
    run, folder = tmp_path / "run", make_mixed_folder(tmp_path / "mixed")
    arguments = options(folder, run, "--epochs", "2", "--workers", "1", "--validation", f"held={folder}")
    assert main([*arguments, "--batch-size", "16", "--loggers", "tensorboard"]) == 0
    assert [r["step"] for r in journal(run)] == list(range(1, 15))  # 112 // 16 steps an epoch, none lost
    check_skipped({(r["key"], r["reason"]) for r in journal(run, "skipped")})
    assert len(journal(run, "skipped")) == 6  # each once, though every epoch meets them
    assert journal(run)[-1]["skipped_samples"] == 6
    assert sum(r["cut_captions"] for r in journal(run)) == 2  # the long caption, once an epoch
    said = capsys.readouterr().out
    assert "skipped 6 bad samples" in said
    assert journal(run, "evaluations")[-1]["counts"] == {"pictures": 106, "captions": 106, "skipped": 6}
    assert not USED & {r["key"] for r in journal(run, "skipped")}
    assert list((run / "tensorboard").iterdir())


def test_options_that_a_resumed_run_cannot_take_are_refused(
    finished: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(finished), "--epochs", "7", "--lr", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "other settings (recipe.optimization.lr is 0.0005 there and 0.1 here; epochs is 6.0 there and 7.0" in error
    assert "only these may change: --data, --validation, --teacher-features, --workers, --device," in error
    assert f"to start a new run from its weights, use --model {finished}" in error


def test_a_run_goes_on_with_the_same_numbers_where_its_data_were_moved_and_its_machinery_is_another(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    """Everything that a resumed run may change at once, but what changes rounding."""
    run, moved = tmp_path / "moved", shutil.copytree(images, tmp_path / "elsewhere")
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("final", "step-00000018", "report.html"))
    command = ["train", "--resume", "--output", str(run), "--data", str(moved), "--validation", f"held={moved}",
               "--workers", "0", "--device", "cpu", "--parallel", "fsdp", "--log-every", "2", "--evaluate-every", "0",
               "--save-every", "0.5", "--keep-checkpoints", "1", "--keep-every", "3", "--loggers", "tensorboard"]
    _, errors = (resumed := in_another_process(command)).communicate(timeout=300)
    assert resumed.returncode == 0, errors.decode()
    theirs = [record for record in journal(finished) if record["step"] <= 15 or record["step"] % 2 == 0]
    assert without_timings(journal(run)) == without_timings(theirs)
    of_training = [record for record in journal(finished, "evaluations")  # other tests have evaluated it since
                   if (record["weights"], record["evaluator"]) == ("online", "retrieval")]
    assert journal(run, "evaluations") == of_training
    ours, whole = aclip.load(run).state_dict(), aclip.load(finished).state_dict()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)

    config, before = (json.loads((folder / "config.json").read_text()) for folder in (run, finished))
    assert (config["data"], config["workers"], config["log_every"]) == ([str(moved)], 0, 2)
    changes = config.pop("changes")
    assert changes == [{"step": 15, "before": {name: before[name] for name in CHANGEABLE
                                               if before[name] != config[name]}}]
    assert changes[0]["before"].keys() == set(CHANGEABLE) - {"teacher_features", "micro_batch", "recompute", "compile"}
    assert config.keys() == before.keys()


@pytest.mark.parametrize(("changes", "sentence"), [
    (["--data", "{}[:23]"], "the data of {} had 24 pairs when the run was started and has 23 now"),
    (["--validation", "held={}[:23]"], "held-out set 'held' of {} had 24 pairs when the run was started and has 23"),
    (["--data", "{}[:12]=2", "{}[12:]=1"], "--data names other sources or weights than the run in {}"),
])
def test_other_pairs_are_not_resumed_on(
    changes: list[str], sentence: str, finished: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.json").read_bytes()
    assert main(["train", "--resume", str(finished), *(word.format(images) for word in changes)]) == 2
    assert sentence.format(finished) in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before


def under_torchrun(
    ranks: int, arguments: Sequence[str], program: tuple[str, ...] = ("-m", "aclip")
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program,
         *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Adam amplifies rounding, so that losses are compared to 1e-3, and what is counted exactly."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
        for key in ("step", "samples_seen", "lr", "cut_captions", "skipped_samples", "ema_momentum"):
            assert one[key] == other[key]


def test_processes_under_torchrun_train_as_one_does(images: Path, tmp_path: Path) -> None:
    """Two processes that share everything, in parts; then one goes on."""
    arguments = options(images, tmp_path / "two", "--epochs", "1", "--workers", "0", "--device", "cpu",
                        "--validation", f"held={images}", "--save-every", "0.1", "--keep-checkpoints", "9")
    done = under_torchrun(2, [*arguments, "--parallel", "fsdp", "--micro-batch", "2", "--loggers", "tensorboard"])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1  # one process writes
    assert done.stdout.count("done. model:") == 1
    assert "2 processes (fsdp), 2 pairs at a time" in done.stdout
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    two, one = (tmp_path / name for name in ("two", "one"))
    close(journal(two), journal(one))
    assert [r["metrics"].keys() for r in journal(two, "evaluations")] == [
        r["metrics"].keys() for r in journal(one, "evaluations")]
    for file in ("config.json", "report.html", "final/open_clip_model.safetensors"):
        assert (two / file).exists()

    shutil.rmtree(two / "checkpoints" / "step-00000003")
    assert main(["train", "--resume", str(two)]) == 0
    close(journal(two), journal(one))


def test_a_batch_that_does_not_divide_is_refused_by_all(images: Path, tmp_path: Path) -> None:
    done = under_torchrun(2, options(images, tmp_path / "run", "--batch-size", "7", "--device", "cpu"))
    assert done.returncode != 0
    assert done.stderr.count("not 7 for 2") == 1  # though both have met it


def test_an_error_before_the_processes_meet_is_told_once(tmp_path: Path) -> None:
    done = under_torchrun(2, ["train", "--resume", str(tmp_path / "nowhere")])
    assert done.returncode != 0
    assert done.stderr.count("holds no run to resume") == 1


def test_an_error_that_one_process_meets_alone_is_told_with_its_rank(images: Path, tmp_path: Path) -> None:
    code = ("import os, sys; from aclip import data; from aclip.cli import main; from aclip.errors import DataError\n"
            "def opens(specs):\n"
            "    if os.environ['RANK'] == '1': raise DataError('gone on this machine')\n"
            "    return opened(specs)\n"
            "opened, data.open_training = data.open_training, opens\n"
            "sys.exit(main(sys.argv[1:]))\n")
    (tmp_path / "alone.py").write_text(code)
    done = under_torchrun(2, options(images, tmp_path / "run", "--device", "cpu"),
                          program=(str(tmp_path / "alone.py"),))
    assert done.returncode != 0
    assert done.stderr.count("aclip: rank 1: gone on this machine") == 1


def test_a_loss_that_stays_nan_stops_the_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(images, tmp_path / "run", "--epochs", "4", "--lr", "1e30", "--workers", "0")) == 1
    error = capsys.readouterr().err
    assert "the loss became NaN or inf at step" in error
    assert "try a lower --lr" in error
    assert not (tmp_path / "run" / "final").exists()


def test_data_that_has_grown_is_not_resumed_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "grown"
    run.mkdir()
    config = json.loads((finished / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"num_pairs": 23}))
    assert main(["train", "--resume", str(run)]) == 2
    assert "had 23 pairs when the run was started and has 24 now" in capsys.readouterr().err


def test_held_out_sets_of_one_name_are_refused(
    finished: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished), "--data", f"held={images}", f"held={images}"]) == 2
    assert "two held-out sets are called 'held'" in capsys.readouterr().err


def test_cut_captions_between_two_records_survive_a_resume(tmp_path: Path) -> None:
    """Checkpoints every epoch of 7 steps, records every 5: what was counted between them is not lost."""
    folder = make_mixed_folder(tmp_path / "mixed")
    more = ("--epochs", "2", "--workers", "0", "--batch-size", "16", "--log-every", "5", "--save-every", "0.7")
    assert main(options(folder, tmp_path / "whole", *more)) == 0
    whole = [r["cut_captions"] for r in journal(tmp_path / "whole")]
    assert sum(whole) == 2
    run = tmp_path / "again"
    assert main(options(folder, run, *more)) == 0
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    assert main(["train", "--resume", str(run)]) == 0
    assert without_timings(journal(run)) == without_timings(journal(tmp_path / "whole"))


@pytest.mark.parametrize(("changes", "sentence"), [
    (["--recipe.objectives.ntxent.options.temperature", "abc"], "temperature should be a valid number"),
    (["--recipe.passes.masked.masking-options.block-size", "1.5"], "block_size should be a valid integer"),
    (["--lr", "nan"], "lr should be a finite number"),
    (["--workers", "-1"], "workers should be greater than or equal to 0"),
    (["--image-size", "1x2x3"], "image_size"),
])
def test_options_are_checked_before_anything_is_read(
    changes: list[str], sentence: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(images), "--output", str(tmp_path / "run"), "--model", "vit-micro", *changes]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_is_met_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "x.csv", "--batchsize", "3"]) == 2
    assert "--batch-size" in capsys.readouterr().err
