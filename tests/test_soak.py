"""The soaks at their smallest: real processes, really killed. The scripts alone do more."""

import pytest

from scripts import soak_prep, soak_train


def test_every_way_gives_the_same_bytes(capsys, tmp_path):
    flags = ("--megabytes", "10", "--workers", "2", "--num-tasks", "2", "--kills", "2", "--no-ray", "--no-faults")
    assert soak_prep.main([*flags, "--folder", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [" same" in row for row in rows] == [True] * 4
    assert list(tmp_path.iterdir()) == []


def test_it_tells_a_difference_and_a_failure(capsys, tmp_path):
    soak = soak_prep.Soak(tmp_path, [], soak_prep.random.Random(1))

    def made(text):
        soak.output.mkdir()
        (soak.output / "metadata.json").write_text(text)
        (soak.output / "timing.js").write_text(str(soak_prep.time.monotonic()))  # the machine's, not the corpus's

    soak.way("first", lambda: made("a"))
    soak.way("same", lambda: made("a"))
    assert not soak.failed
    soak.way("other", lambda: made("b"))
    assert soak.failed
    assert "DIFFERENT: metadata.json" in capsys.readouterr().out
    soak.failed = False

    def broken():
        raise soak_prep.Broken("exit code 1")

    soak.way("broken", broken)
    assert soak.failed
    assert "FAILED: exit code 1" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["local", "gs"])
def test_training_under_misfortune_ends_as_the_quiet_run(capsys, tmp_path, where):
    train = soak_train.SMALL.replace("--steps 6000", "--steps 1500")
    flags = ("--train", train, "--minutes", "0.25", "--every", "2", "--out", where, "--folder", str(tmp_path))
    assert soak_train.main(flags) == 0, capsys.readouterr()
    assert "equal to the quiet run: weights, moments" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_training_soak_tells_a_difference():
    with pytest.raises(soak_train.Broken, match=r"model\.safetensors differ"):
        soak_train.compare({"model.safetensors": "a", "step": 3}, {"model.safetensors": "b", "step": 3})
