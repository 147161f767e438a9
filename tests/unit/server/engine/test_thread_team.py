"""When a lone caller gets a team of threads."""

from __future__ import annotations

from layertap_server.engine.thread_team import ThreadTeam

FREE = {"wall_s": 0.005, "cpu_s": 0.0048}
WAITED = {"wall_s": 0.5, "cpu_s": 0.1}


def batches_without(team: ThreadTeam) -> int:
    """Returns how many batches that do not wait it takes until the team is tried again."""
    count = 0
    while not team.pays:
        team.note(**FREE)
        count += 1
    return count


def test_a_team_stays_while_the_cores_are_free() -> None:
    team = ThreadTeam()
    for _ in range(1000):
        team.note(**FREE)
        assert team.pays


def test_a_team_that_waited_for_cores_is_left_out_ever_longer() -> None:
    team = ThreadTeam()
    pauses = []
    for _ in range(8):
        team.note(**WAITED)
        assert not team.pays
        pauses.append(batches_without(team))
    assert pauses == [32, 64, 128, 256, 512, 1024, 1024, 1024]


def test_only_batches_in_a_row_bring_it_back() -> None:
    team = ThreadTeam()
    team.note(**WAITED)
    for _ in range(10):
        for _ in range(31):
            team.note(**FREE)
        team.note(**WAITED)
        assert not team.pays
    assert batches_without(team) == 32


def test_a_team_that_paid_for_a_while_is_left_out_briefly() -> None:
    team = ThreadTeam()
    for _ in range(4):
        team.note(**WAITED)
        batches_without(team)
    for _ in range(32):
        team.note(**FREE)
    team.note(**WAITED)
    assert batches_without(team) == 32
