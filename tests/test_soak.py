"""The soak at its smallest: real processes of every kind, really killed. scripts/soak_prep.py alone does more."""

from scripts import soak_prep


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
