from pathlib import Path

import pytest

import config
from config import UserError
from train import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load(*argv):
    return config.load(Config, list(argv), "doc")


def test_defaults_then_files_left_to_right_then_flags(tmp_path):
    (tmp_path / "a.py").write_text("lr = 1e-4\nmax_steps = 6 * 100\nways = 5\n")
    (tmp_path / "b.py").write_text(
        "import math\n_half = 0.5\nmeta_share = _half\nways = int(math.sqrt(64))\n"
    )
    cfg = load("--lr=0.5", str(tmp_path / "a.py"), str(tmp_path / "b.py"))
    assert (cfg.lr, cfg.max_steps, cfg.ways, cfg.meta_share, cfg.shots) == (0.5, 600, 8, 0.5, 4)
    assert load(str(tmp_path / "b.py"), str(tmp_path / "a.py")).ways == 5


def test_values_take_their_declared_type():
    cfg = load("--lr=1", "--first_order=false", "--compile=True", "--out_dir=a=b")
    assert (cfg.lr, cfg.first_order, cfg.compile, cfg.out_dir) == (1.0, False, True, "a=b")
    assert type(cfg.lr) is float and load("--compile=None").compile is None
    assert load("--d_model=48").d_hidden == 192 and load("--d_model=48", "--d_hidden=7").d_hidden == 7


def test_a_switch_needs_no_value():
    assert load("--first_order").first_order and not load("--first_order=False").first_order


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--max_steps=1.5", "max_steps must be int, got '1.5'"),
        ("--first_order=yes", "first_order must be bool, got 'yes'"),
        ("--lr=nan", "lr must be finite"),
        ("--lr=fast", "lr must be float, got 'fast'"),
        ("--compile=1", "compile must be bool | None"),
        ("--warmup-steps=3", "did you mean 'warmup_steps'?"),
        ("--inner_stesp=3", "did you mean 'inner_steps'?"),
        ("--zzzz=3", "--help lists the keys"),
        ("--zzzz", "--help lists the keys"),
        ("--wandb", "flags are written --key=value"),
        ("lr=3", "neither a config file"),
        ("nowhere.py", "nowhere.py: FileNotFoundError"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(flag, says):
    with pytest.raises(UserError) as error:
        load(flag)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("max_step = 3", "unknown key 'max_step' in {path}; did you mean 'max_steps'?"),
        ("lr = 'fast'", "lr must be float, got 'fast'"),
        ("ways = True", "ways must be int, got True"),
        ("ways = 2.0", "ways must be int, got 2.0"),
        ("lr = 1 /", "{path}: SyntaxError"),
        ("lr = 1 / 0", "{path}: ZeroDivisionError"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, text, says):
    """nanoGPT's exec of config files let a mistyped key pass silently."""
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert says.format(path=path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--d_model=100"], "d_model = 100 must be an even multiple of n_heads = 12"),
        (["--n_kv_heads=5"], "n_heads = 12 must be a multiple of n_kv_heads = 5"),
        (["--batch_size=100"], "global_batch_size = 256 must be a multiple of batch_size = 100"),
        (["--window=4096"], "window = 4096 must lie in 2 to context = 2048"),
        (["--adapt=("], "adapt = '(' is neither"),
        (["--ways=1"], "ways must be at least 2, got 1"),
        (["--meta_share=2"], "meta_share must lie in [0, 1], got 2.0"),
        (["--episodes_from=batch"], "episodes_from = batch reads plain text: set read_out = context"),
        (["--episodes_from=batch", "--adapt=all"], "adapt must be head, got 'all'"),
        (["--episodes_from=batch", "--read_out=context", "--head_start=random"], "only head_start = zero"),
        (["--meta_decay=5"], "meta_decay must lie in [0, 1], got 5.0"),
        (["--query_lm", "--adapt=all"], "query_lm needs adapt = head, got 'all'"),
        (["--read_out=word"], "read_out must be one of mask, context, got 'word'"),
        (["--head_start=one"], "head_start must be one of zero, random"),
        (["--log_every=0"], "log_every must be at least 1, got 0"),
        (["--lr=0"], "lr must be positive"),
    ],
)
def test_fields_that_do_not_go_together_are_told_with_both_numbers(flags, says):
    with pytest.raises(UserError) as error:
        load(*flags)
    assert says in str(error.value)


def test_help_lists_every_field_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as exit:
        load("--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "doc" in out
    comments = config.comments(Config)
    for field in Config.__dataclass_fields__.values():
        assert f"--{field.name}={field.default}" in out
        assert len(comments[field.name]) > 8 and comments[field.name] in out, field.name


def test_a_value_by_rule_follows_what_it_depends_on(tmp_path):
    """`inner_lr = 25.6 / d_model` in a config file stayed as it was when a flag changed d_model."""
    assert load().inner_lr == 25.6 / 96
    for name in ("11m", "570m"):
        cfg = load(str(CONFIGS / f"{name}.py"), "--d_model=384")
        assert (cfg.inner_lr, cfg.d_hidden) == (25.6 / 384, 1536)
    assert load("--d_model=384", "--inner_lr=0.1").inner_lr == 0.1


def test_fields_of_episodes_are_checked_where_episodes_run():
    """`configs/vanilla.py --context=64` was refused for the window of episodes that never run."""
    bad = ["--context=64", "--ways=1", "--adapt=(", "--shots=0", "--head_layers=0"]
    vanilla = [str(CONFIGS / "11m.py"), str(CONFIGS / "vanilla.py")]
    assert load(*vanilla, *bad).context == 64
    with pytest.raises(UserError, match="eval_ways must be at least 2, got 1"):
        load(*vanilla, "--eval_ways=1")
    assert load(*vanilla, "--eval_ways=1", "--eval_episodes=0").eval_ways == 1
    for flag in bad:
        with pytest.raises(UserError):
            load(str(CONFIGS / "11m.py"), flag)
