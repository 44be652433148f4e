"""What is measured: one `Case` is one row of the results.

A case is plain data, so that it can be shown before it runs (`--dry-run`), sent to the subprocess
that measures it, and compared with the rows that are already there (`--resume`). No torch in this
file: `resfuse --help` stays quick.
"""

from dataclasses import asdict, dataclass, field

from resfuse.bench.models.source import shape_text

MODES = ("inference", "train")
# MLPerf's SingleStream, Offline and Server: one batch after the other; as many at the same time as
# the backend has streams; and as they arrive.
LATENCY, THROUGHPUT, SERVER = SCENARIOS = ("latency", "throughput", "server")
MEMORY_FORMATS = ("contiguous", "channels_last")  # the faster one of a convolution last


@dataclass(frozen=True)
class Precision:
    """How numbers are stored (`dtype`, a torch name) and multiplied (`math_mode`).

    `autocast`: the torch name of what autocast multiplies in, where a training step runs under it.
    `compute`: that of the dtype in which each backend computes, in its own way, a network that is
    given in `dtype`, as are images and answers.
    """

    dtype: str
    math_mode: str
    autocast: str | None = None
    compute: str | None = None

    @property
    def product(self) -> str:
        """Returns the type that matrix products and convolutions take."""
        return self.autocast or self.storage

    @property
    def storage(self) -> str:
        """Returns the type of weights and of what lies between layers."""
        return self.compute or self.dtype

    @property
    def is_quantized(self) -> bool:
        """True where a network is computed in integers, which takes calibration."""
        return self.compute == "int8"


# timm's names on the command line. Rows of different math modes are never compared.
PRECISIONS = {
    "float32": Precision("float32", "ieee"),
    "tf32": Precision("float32", "tf32"),
    "float16": Precision("float16", "fp16"),
    "bfloat16": Precision("bfloat16", "bf16"),
    # OpenVINO's name, and ours in build_engine: an fp32 network, computed in bfloat16 inside.
    "bf16": Precision("float32", "bf16", compute="bfloat16"),
    # The same in 8-bit integers, whose ranges come from photographs that no case measures.
    "int8": Precision("float32", "int8", compute="int8"),
    # Weights, gradients and optimizer in fp32; fp16's gradients are scaled (GradScaler).
    "amp_bf16": Precision("float32", "amp_bf16", "bfloat16"),
    "amp_fp16": Precision("float32", "amp_fp16", "float16"),
}


USUAL_PRECISION = "float32"
MOST = "max"  # in place of queries/s


@dataclass(frozen=True)
class Load:
    """The columns that say how batches come: rows of two loads are never compared."""

    scenario: str  # "" in training
    requested_qps: str = ""  # "50", or "max"
    latency_bound_ms: str = ""

    def text(self) -> str:
        """`server, 50 queries/s` or `server, most queries/s with p99 under 15 ms`."""
        if self.scenario != SERVER:
            return self.scenario
        if self.requested_qps != MOST:
            return f"{SERVER}, {self.requested_qps} queries/s"
        return f"{SERVER}, most queries/s with p99 under {self.latency_bound_ms} ms"


@dataclass(frozen=True)
class Case:
    """One measurement: a model, run in one way, beside the baseline it is compared with.

    `baseline` runs the same model with the same weights, inputs, precision and batch, in torch's
    contiguous (NCHW) format unless the name says otherwise, interleaved with the case round by
    round.
    """

    model: str  # a name that bench/models builds it from
    backend: str
    mode: str
    device: str
    precision: str
    memory_format: str
    batch_size: int  # images
    img_size: int  # pixels: the height, and the width where `img_width` is 0
    baseline: str = "eager"
    baseline_memory_format: str = "contiguous"
    weights: str = "seeded"  # "seeded", "own", "pretrained", or a file
    images: str = "bundled"  # "bundled", or a folder
    parallel: str = ""  # "ddp", "fsdp": training on `world_size` processes, `batch_size` in each
    world_size: int = 1
    channels: int = 3  # of an image
    img_width: int = 0
    origin: str = "resfuse"  # of the model: a package and its version, or a file and its hash
    scenario: str = LATENCY  # of inference
    qps: float = 0.0  # server: batches that arrive in a second; 0 searches for the most
    latency_bound_ms: float = 0.0  # server: what the 99th percentile must not pass in the search

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.img_size, self.img_width or self.img_size

    def size_text(self) -> str:
        """`224 pixels`, or the whole shape where it is not that of a square photograph."""
        square = self.channels == 3 and not self.img_width
        return f"{self.img_size} pixels" if square else shape_text(*self.input_shape)

    @property
    def math_mode(self) -> str:
        return PRECISIONS[self.precision].math_mode

    @property
    def is_served(self) -> bool:
        """True where a backend's streams answer several batches at the same time."""
        return self.scenario != LATENCY

    @property
    def load(self) -> Load:
        """The scenario, as rows have it."""
        if self.mode != "inference":
            return Load("")
        if self.scenario != SERVER:
            return Load(self.scenario)
        if self.qps:
            return Load(SERVER, f"{self.qps:.10g}")
        return Load(SERVER, MOST, f"{self.latency_bound_ms:.10g}")

    @property
    def is_baseline(self) -> bool:
        """True where backend and baseline are one thing: the speed-up then shows the noise."""
        if self.scenario == SERVER:  # each backend by itself
            return False
        same_backend = self.backend == self.baseline
        return same_backend and self.memory_format == self.baseline_memory_format

    def identity(self) -> dict[str, str | int]:
        """Returns the columns that identify the case; equal ones measure the same in one
        environment."""
        return {
            "model": self.model,
            "backend": self.backend,
            "mode": self.mode,
            "precision": self.precision,
            "math_mode": self.math_mode,
            "memory_format": self.memory_format,
            "requested_batch_size": self.batch_size,
            f"{'infer' if self.mode == 'inference' else 'train'}_img_size": self.img_size,
            "weights": self.weights,
            "images": self.images,
            "baseline": ""
            if self.scenario == SERVER
            else f"{self.baseline} {self.baseline_memory_format}",
            "parallel": self.parallel,
            "world_size": self.world_size,
            "input_shape": shape_text(*self.input_shape),
            "origin": self.origin,
            **asdict(self.load),
        }

    def label(self) -> str:
        """Returns a line for progress and tables."""
        parts = [
            self.model,
            self.backend,
            self.memory_format,
            self.precision,
            f"batch {self.batch_size}",
        ]
        if self.mode != "inference":
            parts.append(self.mode)
        if self.is_served:
            parts.append(self.load.text())
        if self.parallel:
            parts.append(f"{self.parallel} x{self.world_size}")
        return " ".join(parts)


@dataclass(frozen=True)
class Options:
    """How a case is measured; the same for a whole sweep."""

    seconds: float = 5.0  # timed seconds a case, baseline included
    ci: float | None = None  # stop once the speed-up's interval is narrower than this share
    min_rounds: int = 10
    max_rounds: int = 300
    threads: int = 0  # CPU threads; 0 leaves torch's choice
    seed: int = 0
    timeout_s: float = 300.0  # wall-clock limit of a case, set-up included


@dataclass(frozen=True)
class Request:
    """The command line of a sweep; an empty list means the profile's. What has a default here is
    what a study or a survey asks for that measures plain inference."""

    profile: str
    device: str
    models: list[str]
    backends: list[str]
    batch_sizes: list[int]
    precisions: list[str]
    memory_formats: list[str] = field(default_factory=lambda: ["contiguous"])
    modes: list[str] = field(default_factory=lambda: ["inference"])
    img_size: int | None = None
    baseline: str = "eager"
    baseline_memory_format: str = "contiguous"
    weights: str = "seeded"
    images: str = "bundled"
    parallel: str = ""
    world_size: int = 1
    model_kwargs: tuple[str, ...] = ()  # "key=value", for every model
    input_shape: tuple[int, int, int] | None = None  # channels, height, width
    scenario: str = LATENCY
    qps: float = 0.0  # as in Case
    latency_bound_ms: float = 0.0
