"""Configurations that `resfuse check` found wrong: who finds them, who keeps them, and that neither
a kernel's `choose` nor the engine takes one.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphs import conv_graph, conv_state
from resfuse.bench.layers.kernel_check import checker
from resfuse.bench.layers.kernel_check.trials import TRIALS, Place, Trial
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.tactics import TACTICS
from resfuse.kernels.engine.tuning.tuner import Tuner
from resfuse.kernels.gpu.block_tail import block_tail_config
from resfuse.kernels.gpu.bn_act import bn_act, bn_act_config
from resfuse.kernels.gpu.conv import conv_config, depthwise
from resfuse.kernels.gpu.conv1x1 import conv1x1_config
from resfuse.kernels.gpu.int8_maps import convert, pool
from resfuse.kernels.gpu.registry import KERNELS
from resfuse.kernels.gpu.split_k import split_k, split_k_config
from resfuse.kernels.gpu.stem import stem_config
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, key_of
from resfuse.kernels.tuning_cache.timing_cache import TimingCache, known

pytestmark = pytest.mark.usefixtures("own_times")

CPU = torch.device("cpu")
ALL = dict(TRIALS)  # whatever tests put in their places


@pytest.fixture
def own_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is barred yet."""
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path))
    known.cache_clear()
    yield
    known.cache_clear()


# Who chooses


def proven(configs: list[Any]) -> list[Any]:
    """The others are tried by the engine alone."""
    return [config for config in configs if config.is_proven]


CONV = ConvProblem(32, 64, 56, 56, 64, 3, 3, Geometry(padding=(1, 1)))
WINDOWS = pool.PoolProblem(8, 300, 9, 9, 5, 5, (3, 3), (2, 2), (1, 1))
CHOOSERS: dict[str, tuple[str, Any, Callable[[Barred], Any], Callable[[], list[Any]]]] = {
    "conv": (
        "conv_bn_act", CONV,
        lambda b: conv_config.choose(CONV, 132, b), lambda: proven(conv_config.candidates(CONV)),
    ),
    "depthwise": (
        "conv_bn_act", deep := replace(CONV, geometry=CONV.geometry._replace(groups=64)),
        lambda b: depthwise.choose(deep, 132, b), lambda: depthwise.candidates(deep),
    ),
    "conv_int8": (
        "conv_int8", in_int8 := replace(CONV, dtypes=dtypes_of("int8")),
        lambda b: conv_config.choose(in_int8, 132, b, "conv_int8"),
        lambda: proven(conv_config.candidates(in_int8)),
    ),
    "convert_int8": (
        "convert_int8", in_int8,
        lambda b: convert.choose(1 << 20, 132, b), lambda: list(convert.CONFIGS),
    ),
    "pool_int8": (
        "pool_int8", in_int8,
        lambda b: pool.choose(WINDOWS, 132, b), lambda: pool.candidates(WINDOWS),
    ),
    "split_k": (
        "conv_bn_act_split_k", late := replace(CONV, n=1, c=512, h=7, w=7, k=512),
        lambda b: split_k_config.choose(late, 132, b), lambda: split_k_config.candidates(late),
    ),
    "conv1x1": (
        "conv1x1", wide := conv1x1_config.Conv1x1Problem(32, 64, 56, 56, 256, 1, 1),
        lambda b: conv1x1_config.choose(wide, 132, (9, 0), b),
        lambda: conv1x1_config.candidates(wide),
    ),
    "stem": (
        "stem", images := stem_config.StemProblem(8, 3, 224, 224, 64, "fp16"),
        lambda b: stem_config.choose(images, 132, (9, 0), b),
        lambda: stem_config.candidates(images),
    ),
    "bn_act": (
        "bn_act", maps := bn_act_config.BnActProblem(8, 64, 56, 56, "fp16"),
        lambda b: bn_act_config.choose(maps, 132, b), lambda: bn_act_config.candidates(maps),
    ),
    "block_tail": (
        "block_tail", tail := block_tail_config.TailProblem(32, 64, 56, 56, 256, 64, 1, "fp16"),
        lambda b: block_tail_config.choose(tail, 132, b),
        lambda: proven(block_tail_config.candidates(tail)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_kernel_chooses_none_that_is_barred(name: str) -> None:
    """Again and again, until there is none left."""
    kernel, problem, choose, candidates = CHOOSERS[name]
    assert kernel in KERNELS
    barred: Barred = NONE
    mode = problem.math_mode
    chosen = []
    for _ in candidates():
        config = choose(barred)
        assert config in candidates() and config not in chosen
        chosen.append(config)
        barred |= {key_of(kernel, mode, config)}
    with pytest.raises(ValueError, match=rf"all {len(chosen)} configurations of {kernel} .*{mode}"):
        choose(barred)
    assert choose(NONE) == chosen[0]
    assert choose(frozenset({key_of(kernel, "tf32", chosen[0])})) == chosen[0]


def test_where_no_split_may_run_the_whole_does() -> None:
    problem = ConvProblem(1, 128, 3, 5, 16, 3, 3, Geometry((1, 1), (1, 1)))
    cache = TimingCache(CPU)
    for config in split_k_config.candidates(problem):
        cache.put(key_of("conv_bn_act_split_k", "fp16", config), None)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator).half() for s in ((1, 128, 3, 5), (16, 128, 3, 3)))
    launched = []

    def noted(*arguments: Any) -> Any:
        launched.append(arguments)
        return launch(*arguments)

    launch = split_k.conv.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_k.conv, "launch", noted)
        y = split_k.conv_bn_act_split_k(x, w, None, padding=(1, 1), activation="identity")
    want = torch.conv2d(x.double(), w.double(), padding=1)
    assert len(launched) == 1
    assert ((y - want).norm() / want.norm()).item() < 1e-3


# Who finds them


def small(kernel: str) -> Trial:
    return next(ALL[kernel](Place("cpu", "fp16", True)))


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Trial]:
    """Kernels whose smallest trial expects something else."""

    def spoil(kernel: str) -> Trial:
        right = small(kernel)
        wrong = replace(right, expected=lambda: tuple(y + 1 for y in right.expected()))
        monkeypatch.setitem(TRIALS, kernel, lambda place: iter([wrong]))
        monkeypatch.setattr(checker, "SMALL_MODES", (right.math_mode,))
        return right

    return spoil


def run(kernel: str) -> list[str]:
    """Statuses of a kernel's trials."""
    told: list[dict[str, Any]] = []
    checker.run_trials(
        [kernel], ["ieee", "fp16", "int8"], "cpu", set(), lambda **news: told.append(news)
    )
    return [news["status"] for news in told if "status" in news]


@pytest.mark.parametrize("kernel", TRIALS)
def test_what_is_wrong_is_barred_until_it_is_right(
    kernel: str, spoilt: Callable[[str], Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = spoilt(kernel)
    assert run(kernel) == ["fail_accuracy"]
    cache = TimingCache(CPU)
    assert cache.barred == {key_of(kernel, trial.math_mode, trial.config)}
    row = json.loads(cache.path.read_text().splitlines()[-1])
    assert "elements are wrong" in row["why"]
    monkeypatch.setitem(TRIALS, kernel, lambda place: iter([small(kernel)]))
    assert run(kernel) == ["pass"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TimingCache(CPU).barred == NONE


def test_what_fails_to_run_is_not_wrong(
    spoilt: Callable[[str], Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt("bn_act")

    def raises(trial: Trial) -> None:
        raise RuntimeError("planted failure")

    monkeypatch.setattr(checker, "judge", raises)
    assert run("bn_act") == ["fail_to_run"]
    assert TimingCache(CPU).barred == NONE


def test_a_trial_names_the_configuration_it_launches() -> None:
    for kernel, trials in TRIALS.items():
        for trial in trials(Place("meta", "fp16", False)):
            assert (
                trial.launch.num_warps == getattr(trial.config, "tile", trial.config).num_warps
            ), kernel


# Who leaves them out


def test_the_runtime_leaves_out_what_is_barred() -> None:
    """As `fuse` calls a kernel, without a word on configurations."""
    x = torch.randn(1, 24, 5, 7, generator=torch.Generator().manual_seed(0)).half()
    scale, shift = torch.ones(24).half(), torch.zeros(24).half()
    problem = bn_act_config.BnActProblem(1, 24, 5, 7, "fp16")
    first = bn_act_config.choose(problem, 132)

    def block() -> int:
        made = bn_act.launch(torch.empty_like(x), x, scale, shift)
        return int(made.constants["BLOCK"])

    assert block() == first.block
    TimingCache(CPU).put(key_of("bn_act", "fp16", first), None)
    known.cache_clear()
    assert block() != first.block


GEMM = ConvProblem(1, 32, 4, 4, 32, 1, 1, dtypes=dtypes_of("fp16"))
OFFERED = {
    "triton_conv": ("conv_bn_act", replace(CONV, n=1, h=5, w=5)),
    "triton_conv1x1": ("conv1x1", GEMM),
    "split_k": (
        "conv_bn_act_split_k",
        ConvProblem(1, 512, 7, 7, 512, 3, 3, Geometry(padding=(1, 1))),
    ),
}


@pytest.mark.parametrize("tactic", OFFERED)
def test_the_engine_does_not_try_what_is_barred(
    tactic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, problem = OFFERED[tactic]
    graph, state = conv_graph(problem), conv_state(problem)
    module = TACTICS[tactic].load()
    barred_choice, other, *_ = module.segments(graph, 0)
    configuration = module.configuration(graph, barred_choice)  # type: ignore[attr-defined]
    assert configuration[0] == f"kernel {kernel} fp16"
    tried: list[Candidate] = []

    def noted(self: Tuner, part: Any, key: tuple[str, str], choice: Candidate) -> None:
        tried.append(choice)
        self._cache.put(key, 1.0)

    monkeypatch.setattr(Tuner, "_measure", noted)
    # as another process found it, and as the cache at hand has it
    for cache, barred in (
        (TimingCache(CPU, tmp_path / "mine"), frozenset({configuration})),
        (barring(TimingCache(CPU, tmp_path / "its own"), configuration), NONE),
    ):
        measurer = Tuner(graph, state, CPU, [tactic], cache, barred)
        with pytest.warns(UserWarning, match="left out: `resfuse check` found it wrong"):
            assert measurer(barred_choice) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert measurer(barred_choice) is None  # told once
            assert measurer(other) == 1.0
    assert tried == [other, other]


def test_a_time_from_before_does_not_help(tmp_path: Path) -> None:
    graph, state = conv_graph(GEMM), conv_state(GEMM)
    module = TACTICS["triton_conv1x1"].load()
    choice = next(iter(module.segments(graph, 0)))
    cache = TimingCache(CPU, tmp_path)
    from resfuse.kernels.engine.ir.candidate import key_of as key_of_part

    cache.put((key_of_part(graph.part(0, 1)), choice.label()), 0.001)
    assert Tuner(graph, state, CPU, ["triton_conv1x1"], cache)(choice) == 0.001
    barring(cache, module.configuration(graph, choice))  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="left out"):
        assert Tuner(graph, state, CPU, ["triton_conv1x1"], cache)(choice) is None


def barring(cache: TimingCache, configuration: tuple[str, str]) -> TimingCache:
    cache.put(configuration, None, "3 of 4 elements are wrong")
    return cache
