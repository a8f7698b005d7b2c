"""`aclip doctor`: what it says, and when it fails."""

import pytest

from aclip import machine, trainer
from aclip.cli import main


@pytest.fixture
def without_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "self_test", lambda device: ())


def test_a_working_installation_is_in_order_and_takes_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for fact in ("open_clip_torch", "torch uses 1 threads", "C++ compiler", "data sets", "gloo (CPU)",
                 "one training step", "a-clip on vit-micro", "one image encoded", "128 features",
                 "everything essential works"):
        assert fact in said


@pytest.mark.usefixtures("without_self_test")
def test_a_missing_extra_is_a_note_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "requires", lambda name: [
        "torch>=2.8", 'no-such-package>=1; extra == "onnx"', 'rich>=14; extra == "onnx"', 'nor-this; extra == "test"',
        'attentive-clip[onnx]; extra == "all"'])
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "no-such-package missing, for aclip export --to onnx" in said
    assert "pip install 'attentive-clip[onnx]'" in said
    assert "nor-this" not in said
    assert "for all" not in said


@pytest.mark.usefixtures("without_self_test")
def test_a_missing_essential_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "requires", lambda name: ["torch>=2.8", "no-such-package>=1"])
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "not everything essential works: no-such-package (missing)" in captured.err
    assert "everything essential works" not in captured.out


def test_a_step_that_fails_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image\nis available")

    monkeypatch.setattr(trainer, "build_trainer", broken)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "one training step (RuntimeError: CUDA error: no kernel image is available)" in capsys.readouterr().err


def test_an_unknown_device_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "abacus"]) == 2
    assert "unknown device 'abacus'" in capsys.readouterr().err
