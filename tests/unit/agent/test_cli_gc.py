"""`gc` of directories alone."""

from pathlib import Path

from .saved import WORLD, Cli, Saved


def test_gc_shows_asks_and_frees(cli: Cli, saved: Saved) -> None:
    words = ("gc", saved.nvme, "--keep-newest", 1)
    for options, answer, free in (
        (("--dry-run",), None, False),
        ((), "n\n", False),
        ((), "y\n", True),
    ):
        outcome = cli(*words, *options, answer=answer)
        assert outcome.status == 0
        assert "older than the newest 1" in outcome.out
        assert saved.file(3, 0).exists() is not free
        assert saved.file(5, 0).exists()
    assert "nothing to free" in cli(*words).out


def test_gc_without_an_answer_frees_nothing(cli: Cli, saved: Saved) -> None:
    assert cli("gc", saved.nvme, "--keep-newest", 1, answer="").status == 2
    assert cli("gc", saved.nvme, "--keep-newest", 1, "--json").status == 2
    assert saved.file(3, 0).exists()


def test_gc_in_json(cli: Cli, saved: Saved) -> None:
    words = ("gc", saved.nvme, "--keep-newest", 1, "--json")
    planned = cli(*words, "--dry-run").document
    assert (planned["freed"], [item["step"] for item in planned["items"]]) == (False, [3])
    done = cli(*words, "--yes").document
    assert (done["freed"], done["items"], done["bytes"]) == (
        True,
        planned["items"],
        sum(len(saved.image(3, rank)) for rank in range(WORLD)),
    )
    assert not saved.file(3, 0).exists()


def test_gc_keeps_the_last_sound_step_when_the_newest_is_damaged(cli: Cli, saved: Saved) -> None:
    saved.flip(5, 0)
    document = cli("gc", saved.nvme, "--keep-newest", 1, "--yes", "--json").document
    assert document["items"] == []
    assert saved.file(3, 0).exists()


def test_gc_keeps_multiples(cli: Cli, saved: Saved) -> None:
    words = ("gc", saved.nvme, "--keep-newest", 1, "--keep-every-steps", 3, "--yes")
    assert "nothing to free" in cli(*words).out
    assert saved.file(3, 0).exists()


def test_gc_of_a_whole_job(cli: Cli, saved: Saved, in_memory: Path) -> None:
    assert cli("gc", in_memory, "--yes").status == 2, "retention has no meaning in memory"
    for root in (saved.nvme, in_memory):
        assert cli("gc", root, "--job", "gpt", "--all", "--yes").status == 0
        assert list(root.iterdir()) == []
