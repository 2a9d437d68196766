"""schedule.py: which micro-step reads what, on any number of ranks."""
import numpy as np
import pytest
from conftest import refuses, toy_config

from schedule import Schedule, block_kinds


def read(cfg, world, steps):
    """{kind: the numbers that all ranks read in these updates}, in the order in which one rank would."""
    plan, numbers = Schedule(cfg, world), {"lm": [], "episodes": []}
    for micro in range(steps.start * plan.micro_steps, steps.stop * plan.micro_steps):
        parts = [plan.micro_step(micro, rank, {"lm": 4, "episodes": 2}) for rank in range(world)]
        assert len({kind for kind, _ in parts}) == 1, "all ranks do the same kind"
        for kind, part in parts:
            numbers[kind] += part
    return numbers


@pytest.mark.parametrize("world", [2, 4])
def test_an_update_is_made_of_the_same_batches_for_any_number_of_ranks(world):
    cfg = toy_config(global_batch_size=32, meta_blocks=2, episodes=2, max_steps=50)
    for step, kinds in enumerate(block_kinds(cfg)):
        alone, shared = (read(cfg, n, range(step, step + 1)) for n in (1, world))
        assert alone == {kind: sorted(numbers) for kind, numbers in shared.items()}
        assert len(alone["lm"]) == 16 * (kinds == "lm").sum()
        assert len(alone["episodes"]) == 8 * (kinds == "episodes").sum()


def test_a_hybrid_run_sees_the_sequences_of_a_vanilla_one_in_the_same_order():
    hybrid, vanilla = (read(toy_config(max_steps=30, meta_share=share), 1, range(30)) for share in (0.5, 0.0))
    assert vanilla == {"lm": list(range(30 * 16)), "episodes": []}
    assert hybrid == {kind: list(range(len(numbers))) for kind, numbers in hybrid.items()}
    assert len(hybrid["lm"]) + 2 * len(hybrid["episodes"]) == 30 * 16 and hybrid["episodes"]


def test_the_kinds_follow_share_and_start_and_do_not_depend_on_max_steps():
    kinds = block_kinds(toy_config(max_steps=4000, meta_share=0.3, meta_start=100))
    assert (kinds[:100] == "lm").all()
    assert (kinds[100:] == "episodes").mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(block_kinds(toy_config(max_steps=200, meta_share=0.3, meta_start=100)), kinds[:200])


def test_batches_that_do_not_divide_are_refused_with_the_numbers():
    refuses(lambda: Schedule(toy_config(), 3), "global_batch_size = 16", "batch_size x ranks = 4 x 3")
    refuses(lambda: Schedule(toy_config(meta_blocks=4), 2), "2 micro-steps", "meta_blocks = 4")


def test_a_kind_of_any_name_keeps_it():
    """NumPy's strings of fixed length once cut the name of a fork's kind to that of the longest before it."""
    kinds = block_kinds(toy_config(max_steps=3))
    kinds[1] = "a kind with a long name"
    assert kinds[1, 0] == "a kind with a long name"
