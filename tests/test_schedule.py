"""schedule.py: which micro-step reads what, on any number of ranks."""

import numpy as np
import pytest
from conftest import toy_config

from config import UserError
from schedule import Schedule, block_kinds


@pytest.mark.parametrize("world", [2, 4])
def test_an_update_is_made_of_the_same_batches_for_any_number_of_ranks(world):
    cfg = toy_config(global_batch_size=32, meta_blocks=2, episodes=2, max_steps=50)

    def read_in(step, world):
        """{(kind, number)} of the sequences and episodes of an update."""
        plan, read = Schedule(cfg, world), []
        for micro in range(step * plan.micro_steps, (step + 1) * plan.micro_steps):
            parts = [plan.micro_step(micro, rank, {"lm": 4, "episodes": 2}) for rank in range(world)]
            assert len({kind for kind, _ in parts}) == 1, "all ranks do the same kind"
            read += [(kind, n) for kind, numbers in parts for n in numbers]
        assert len(set(read)) == len(read), "ranks never share a batch"
        return set(read)

    for step, kinds in enumerate(block_kinds(cfg)):
        assert read_in(step, 1) == read_in(step, world)
        assert len(read_in(step, 1)) == sum(2 * 4 if kind == "episodes" else 32 // 2 for kind in kinds)


def test_a_hybrid_run_sees_the_sequences_of_a_vanilla_one_in_the_same_order():
    def order(cfg):
        """{kind: its numbers in the order in which they are read}."""
        plan, read = Schedule(cfg, 1), {"lm": [], "episodes": []}
        for micro in range(30 * 4):
            kind, numbers = plan.micro_step(micro, 0, {"lm": 4, "episodes": 1})
            read[kind] += numbers
        return read

    hybrid, vanilla = order(toy_config(max_steps=30)), order(toy_config(max_steps=30, meta_share=0.0))
    assert hybrid["lm"] == list(range(len(hybrid["lm"]))) and vanilla["lm"] == list(range(30 * 16))
    assert hybrid["episodes"] == list(range(len(hybrid["episodes"]))) and vanilla["episodes"] == []
    assert len(hybrid["lm"]) + 4 * len(hybrid["episodes"]) == 30 * 16


def test_the_kinds_follow_share_and_start_and_do_not_depend_on_max_steps():
    kinds = block_kinds(toy_config(max_steps=4000, meta_share=0.3, meta_start=100))
    assert (kinds[:100] == "lm").all()
    assert (kinds[100:] == "episodes").mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(block_kinds(toy_config(max_steps=200, meta_share=0.3, meta_start=100)), kinds[:200])


def test_batches_that_do_not_divide_are_told_with_the_numbers():
    with pytest.raises(
        UserError, match=r"global_batch_size = 16 must be a multiple of batch_size x ranks = 4 x 3"
    ):
        Schedule(toy_config(), 3)
    with pytest.raises(UserError, match=r"2 micro-steps .* must be a multiple of meta_blocks = 4"):
        Schedule(toy_config(meta_blocks=4), 2)


def test_joint_micro_steps_read_the_sequences_of_next_token_prediction():
    """In the order of a vanilla run: the two kinds share one series."""
    cfg = toy_config(max_steps=30, episodes_from="batch", read_out="context")
    plan, sizes = Schedule(cfg, 1), {"lm": 4, "joint": 4}
    read = [plan.micro_step(micro, 0, sizes) for micro in range(len(plan.kinds) * plan.micro_steps)]
    assert {kind for kind, _ in read} == {"lm", "joint"}
    assert [n for _, numbers in read for n in numbers] == list(range(30 * 16))


def test_episodes_end_when_their_weight_has_decayed():
    kinds = block_kinds(toy_config(max_steps=200, meta_start=50, meta_decay=0.25, meta_share=1.0))
    assert (kinds[50:100] == "episodes").all() and (kinds[:50] == "lm").all() and (kinds[100:] == "lm").all()


def test_a_kind_of_any_name_keeps_it():
    """NumPy's strings of fixed length once cut the name of a fork's kind to that of the longest before it."""
    kinds = block_kinds(toy_config(max_steps=3))
    kinds[1] = "a kind with a long name"
    assert kinds[1, 0] == "a kind with a long name"
