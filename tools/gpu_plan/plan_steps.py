"""STEPS: what the plan measures, in the order of its worth. Each stands for one command line.

Three parts, for a GPU that is lent for minutes: the first brings the headline home, the second
int8, what was left and other depths, the third what can wait. Asking for a part runs what is
unfinished of those before it first. fp8 is left out: nothing here computes in it yet. Energy,
clocks and throttling are columns of every row.
"""

from dataclasses import dataclass

from resfuse.tools.gpu_plan.costs import MANY, ONE, PREDICTED_MS

PARTS = ("first", "second", "third")
BUDGET_S = 540.0
LIMIT_MB = 15  # of the archive: what brings files back often takes 16 a file
SURVEY_S = 5.0  # importing torch, waking the GPU; 20 more where this machine's ceilings are unknown
PROBE = "probe"


@dataclass(frozen=True)
class Step:
    """`line`: what to run; PROBE is the plan's own. `cost_s` and `bound_s`: of what is no case of a
    network, else 0, since costs.py knows. `predicted`: what an H200 is expected to answer."""

    name: str
    part: str
    measures: str
    line: str
    cost_s: float = 0.0
    bound_s: float = 0.0
    predicted: str = ""  # PREDICTED_MS


_TURNS = "--memory-format channels_last --baseline-memory-format channels_last"
_HEADLINE = f"bench -m resnet50 --precision float16 --seconds 2 {_TURNS}"
_BESIDE = f"bench -m resnet50 --precision float16 --seconds 4 --ab cudnn_fused,engine {_TURNS}"
_DEPTHS = "resnet18,resnet101,resnet152,resnext50_32x4d"
_DEPTH = f"bench -m {_DEPTHS} --precision float16 --seconds 1 {_TURNS}"


_INT8 = f"bench -m resnet50 --precision int8 --seconds 2 --backend engine {_TURNS}"


def _headline(
    part: str, name: str, backend: str, batch: str, measures: str, predicted: str = ""
) -> Step:
    line = f"{_HEADLINE} -b {batch} --backend {backend}"
    return Step(name, part, measures, line, predicted=predicted)


def _gain(what: str, over: str, batch: int, whose: str) -> str:
    ms = PREDICTED_MS[what, batch]
    return f"{ms:.2f} ms, {PREDICTED_MS[over, batch] / ms:.2f} times {whose}'s speed"


PEER_256 = f"{PREDICTED_MS['peer', MANY]:.2f} ms"
AT_256 = _gain("fp16", "peer", MANY, "the peer")
INT8_256 = _gain("int8", "fp16", MANY, "fp16")
AT_1 = f"{PREDICTED_MS['fp16', ONE]:.2f} ms"
INT8_1 = _gain("int8", "fp16", ONE, "fp16")

STEPS: tuple[Step, ...] = (
    Step(
        PROBE,
        "first",
        "which way to ask cuDNN for conv + ReLU; kernels that have never run on a GPU",
        PROBE,
        20,
        60,
    ),
    _headline("first", "cudnn-1", "cudnn_fused", "1", "the best peer at batch 1", "0.4 to 0.6 ms"),
    _headline("first", "engine-1", "engine", "1", "our engine at batch 1", AT_1),
    _headline("first", "cudnn-256", "cudnn_fused", "256", "the best peer at batch 256", PEER_256),
    _headline("first", "engine-256", "engine", "256", "our engine at batch 256", AT_256),
    Step("beside-1", "first", "engine beside the peer in turns: the ratio", f"{_BESIDE} -b 1"),
    Step("beside-256", "first", "engine beside the peer in turns: the ratio", f"{_BESIDE} -b 256"),
    _headline("first", "fused", "fused", "256,1", "fused modules"),
    _headline("first", "compiled", "compiled", "256,1", "torch.compile by default, frozen"),
    _headline(
        "first", "autotune-256", "compiled_max_autotune", "256", "torch.compile, max-autotune"
    ),
    Step(
        "int8-256",
        "second",
        "our engine in int8: is it right, and faster than its fp16",
        f"{_INT8} -b 256",
        predicted=INT8_256,
    ),
    Step(
        "int8-1",
        "second",
        "our engine in int8: where 57 kernels wait for one another",
        f"{_INT8} -b 1",
        predicted=INT8_1,
    ),
    Step(
        "check-int8",
        "second",
        "every configuration of every kernel in int8 against its twin",
        "check --math-mode int8",
        20,
        60,
    ),
    _headline("second", "eager", "eager", "256,1", "eager beside itself: the noise"),
    _headline("second", "autotune-1", "compiled_max_autotune", "1", "torch.compile, max-autotune"),
    Step(
        "depth-256",
        "second",
        "other depths and widths",
        f"{_DEPTH} -b 256 --backend engine,cudnn_fused",
    ),
    Step(
        "depth-1",
        "second",
        "other depths and widths",
        f"{_DEPTH} -b 1 --backend engine,cudnn_fused",
    ),
    Step(
        "check-fp16",
        "second",
        "every configuration of every kernel against fp64, in fp16",
        "check --math-mode fp16",
        40,
        90,
    ),
    Step(
        "onnxrt",
        "second",
        "ONNX Runtime",
        "bench -m resnet50 --precision float16 --seconds 2 -b 256,1 --backend onnxrt "
        "--memory-format contiguous --baseline-memory-format channels_last",
    ),
    Step(
        "training",
        "third",
        "a training step under autocast to bf16; peak memory",
        "bench -m resnet50 -b 256 --precision amp_bf16 --bench train --seconds 2 "
        f"--backend eager,compiled,fused {_TURNS}",
    ),
    Step(
        "check",
        "third",
        "every configuration of every kernel against fp64",
        "check",
        110,
        240,
    ),
    Step(
        "batch-32",
        "third",
        "a batch between the two",
        f"{_HEADLINE} -b 32 --backend engine,cudnn_fused,fused",
    ),
    Step(
        "bf16",
        "third",
        "the headline in bf16",
        f"bench -m resnet50 --precision bfloat16 --seconds 2 {_TURNS} -b 256,1 "
        "--backend engine,cudnn_fused,fused",
    ),
)
