"""What is asked of speed and size, beside what rows show: met, missed, failed, not measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from benchmarks.bench_step import FITTING
from benchmarks.bench_training import CASES
from benchmarks.cases import CONTRASTIVE_SETS, SIGMOID_SETS, Case
from benchmarks.goal_measures import (
    Measure,
    Rows,
    beside_open_clips_training,
    guard_cost,
    over_compiled_open_clip,
    over_exact_peers,
    over_peer,
    quotient,
    utilisation,
    value,
)
from benchmarks.rows import on_gpu, stamp
from benchmarks.steps import StepCase


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    what: str
    sense: Literal["≤", "≥"]
    asked: float
    unit: str
    measure: Measure
    goal: float | None = None
    """Beyond what is asked."""
    gpu: bool = True
    """Whether rows of GPUs count, or those of CPUs."""


def table(rows: Rows) -> str:
    """The goals as Markdown, and on what was measured."""
    lines = ["| | asked | goal | measured | |", "|---|---:|---:|---:|---|"]
    stamps: dict[str, None] = {}
    for goal in GOALS:
        figures = [f for f in goal.measure(rows) if on_gpu(f.row) == goal.gpu]
        head = f"| {goal.what} | {_bound(goal, goal.asked)} | {_bound(goal, goal.goal)} |"
        if not figures:
            lines.append(f"{head} – | not measured |")
        for figure in figures:
            shown = "–" if figure.value is None else _quantity(goal, f"{figure.value:,.3g}")
            where = f" ({figure.row['device']})" if goal.gpu else ""
            lines.append(f"{head} {shown}{where} | {_state(goal, figure.value)} |")
            stamps[stamp(figure.row)] = None
    if stamps:
        lines += ["", f"Measured on {'; '.join(stamps)}."]
    return "\n".join(lines)


def _bound(goal: Goal, bound: float | None) -> str:
    return "" if bound is None else f"{goal.sense} {_quantity(goal, f'{bound:,g}')}"


def _quantity(goal: Goal, number: str) -> str:
    return f"{number}{'' if goal.unit in ('', '×') else ' '}{goal.unit}"


def _state(goal: Goal, measured: float | None) -> str:
    if measured is None:
        return "failed"

    def reached(bound: float) -> bool:
        return measured <= bound if goal.sense == "≤" else measured >= bound

    if not reached(goal.asked):
        return "**missed**"
    return "goal met" if goal.goal is not None and reached(goal.goal) else "met"


def _loss(
    what: str, case: Case, *, computed: tuple[float, float], kept: tuple[float, float]
) -> tuple[Goal, ...]:
    """The softmax loss's time, asked and goal, with logits computed twice and with all kept."""
    ways = (("logits computed twice", "fastclip", computed), ("all kept", "fastclip-stored", kept))
    return tuple(
        Goal(
            f"{what}, {way}", "≤", asked, "ms",
            value("contrastive", "median_ms", provider=provider, **asdict(case)), goal,
        )
        for way, provider, (asked, goal) in ways
    )  # fmt: skip


def _peak(what: str, file: str, provider: str, case: Case | StepCase, most: float) -> Goal:
    measure = value(file, "peak_bytes", 1e-9, provider=provider, **asdict(case))
    return Goal(what, "≤", most, "GB", measure)


def _step(
    model: str, ratio: tuple[float, float], used: tuple[float, float] | None,
    captions: Literal["demo", "web", "dense"] = "web",
) -> tuple[Goal, ...]:  # fmt: skip
    """A step over compiled open_clip's, and the share of the device's rate; asked and goal."""
    case = StepCase(model, FITTING[model], captions)
    what = f"Step of {model}, {case.batch} pairs, {captions} captions"
    goals = [
        Goal(f"{what}, over compiled open_clip", "≥", ratio[0], "×", over_compiled_open_clip(case),
             ratio[1])
    ]  # fmt: skip
    if used is not None:
        share = f"{what}, executed arithmetic over the data sheet's rate"
        goals.append(Goal(share, "≥", used[0], "%", utilisation(case), used[1]))
    return tuple(goals)


def _over(what: str, file: str, provider: str, least: float, **cells: object) -> Goal:
    """A rate of ours over a peer's, on a CPU."""
    measure = value(file, "ours_over_it", 1.0, provider=provider, **cells)
    return Goal(what, "≥", least, "×", measure, gpu=False)


def _of_cpu(what: str, sense: Literal["≤", "≥"], asked: float, unit: str, measure: Measure) -> Goal:
    return Goal(what, sense, asked, unit, measure, gpu=False)


def _training(model: str, batch: int) -> tuple[Goal, ...]:
    """A whole training beside open_clip's."""
    what = f"Training {model}, {batch:,} pairs a step"
    rate, accuracy = (
        beside_open_clips_training(column, model, batch, relative=relative)
        for column, relative in (("samples_per_second", True), ("mean_accuracy", False))
    )
    return (
        Goal(f"{what}: samples a second over open_clip's", "≥", 1, "×", rate),
        Goal(f"{what}: accuracy more than open_clip's, equal samples", "≥", 0, "points", accuracy),
    )


TRAININGS = CASES["gpu"]
HEADLINE = CONTRASTIVE_SETS["headline"][0]
SHARP = Case(2_048, 512, scale=100.0, noise=8.0)
LARGE = StepCase("ViT-B-32", 32_768, micro_batches=32_768 // FITTING["ViT-B-32"])
STEP = StepCase("ViT-B-32", FITTING["ViT-B-32"])
DEMO = StepCase("RN-Nano/77", 256, "demo", "fp32")
TOKENIZED = {"threads": 1, "corpus": "captions"}
FOUND: dict[str, object] = {"provider": "fastclip", "count": 1_000_000, "jitter": 0.5}
SEARCH: tuple[tuple[str, Literal["≤", "≥"], float, str, str, float], ...] = (
    ("", "≤", 50, "ms", "median_ms", 1.0),
    (", recall at 10", "≥", 0.95, "", "recall_texts", 1.0),
    (", making the index", "≤", 600, "s", "build_s", 1.0),
    (", memory for making it", "≤", 3.22, "GB", "build_rss_mb", 1e-3),
)

GOALS = (
    *_loss("Softmax loss, N=65,536, D=768", HEADLINE, computed=(45, 40), kept=(36, 31)),
    _peak(
        "Softmax loss, N=65,536: memory, gradients included, logits computed twice",
        "contrastive",
        "fastclip",
        HEADLINE,
        1.5,
    ),
    _peak(
        "Softmax loss, N=65,536: memory, all kept", "contrastive", "fastclip-stored", HEADLINE, 10
    ),
    Goal(
        "Softmax loss, N=65,536: time of the fastest exact peer over ours",
        "≥",
        1.5,
        "×",
        over_exact_peers(HEADLINE),
    ),
    Goal(
        "Softmax loss, N=65,536: time of Inf-CL over ours",
        "≥",
        3,
        "×",
        over_peer("contrastive", "inf-cl", HEADLINE),
    ),
    *_loss("Softmax loss, N=32,768, D=512", Case(32_768, 512), computed=(8, 7), kept=(6.5, 5.5)),
    Goal(
        "Softmax loss, N=8,192, D=768",
        "≤",
        0.8,
        "ms",
        value("contrastive", "median_ms", provider="fastclip", **asdict(Case(8_192, 768))),
    ),
    _peak(
        "Softmax loss, N=1,048,576, D=512: memory",
        "contrastive",
        "fastclip",
        Case(1 << 20, 512),
        70,
    ),
    *(
        Goal(
            f"Gradient error at scale 100, open_clip's over ours, {way}",
            "≥",
            least,
            "×",
            quotient(
                "contrastive",
                "gradient_error",
                {"provider": "open_clip"},
                {"provider": provider},
                **asdict(SHARP),
            ),
        )
        for way, provider, least in (
            ("logits computed twice", "fastclip", 8),
            ("all kept", "fastclip-stored", 5),
        )
    ),
    Goal(
        "Sigmoid loss, N=65,536, D=768",
        "≤",
        36,
        "ms",
        value("sigmoid", "median_ms", provider="fastclip", **asdict(SIGMOID_SETS["headline"][0])),
    ),
    *_step("ViT-B-32", (1.6, 2), (40, 50)),
    *_step("ViT-B-16", (1.3, 1.6), (45, 55)),
    *_step("ViT-L-14", (1.15, 1.4), (48, 60)),
    *_step("ViT-B-32", (1.05, 1.25), None, "dense"),
    Goal(
        "Step of ViT-B-32, 32,768 pairs, exact on one GPU",
        "≤",
        3.2,
        "s",
        value("step", "median_ms", 1e-3, provider="fastclip", **asdict(LARGE)),
    ),
    _peak("Step of ViT-B-32, 32,768 pairs: memory", "step", "fastclip", LARGE, 60),
    Goal("What the guard adds to a step of ViT-B-32", "≤", 0.5, "%", guard_cost(STEP)),
    *(
        Goal(
            f"CUDA tokenizer, {batch:,} captions copied in",
            "≥",
            least,
            "M/s",
            value(
                "tokenizer_cuda",
                "per_second",
                1e-6,
                provider="copy+kernel",
                corpus="web",
                batch=batch,
            ),
        )
        for batch, least in ((4_096, 100), (1 << 20, 500))
    ),
    Goal(
        "Batches of photographs decoded by DALI on the GPU",
        "≥",
        8_000,
        "/s",
        value("loader", "per_second", part="gpu", provider="fastclip-dali", case="small"),
    ),
    Goal(
        "Training ViT-B-32, 1,024 pairs a step: waiting for data",
        "≤",
        1,
        "%",
        value("training", "wait_share", 100, provider="fastclip", model="ViT-B-32", batch=1024),
    ),
    *(goal for batch in TRAININGS.batches for goal in _training(TRAININGS.model, batch)),
    _of_cpu(
        "Text tower, 77 positions, the demo's captions: padded over packed",
        "≥",
        3,
        "×",
        over_peer("step", "fastclip-padded", replace(DEMO, part="text")),
    ),
    _of_cpu(
        "The demo's step, 77 positions: padded over packed",
        "≥",
        1.3,
        "×",
        over_peer("step", "fastclip-padded", DEMO),
    ),
    _over("Tokenizer, over open_clip's", "tokenizer", "open_clip", 100, **TOKENIZED),
    _over(
        "Tokenizer, over the fastest exact one (cleaning and instant)",
        "tokenizer",
        "clean+instant",
        40,
        **TOKENIZED,
    ),
    _over("Tokenizer, over Hugging Face's", "tokenizer", "tokenizers", 80, **TOKENIZED),
    _over(
        "Tokenizer, over Hugging Face's, many languages",
        "tokenizer",
        "tokenizers",
        60,
        **{**TOKENIZED, "corpus": "multilingual"},
    ),
    _over("Tokenizer, over instant, which does not clean", "tokenizer", "instant", 5, **TOKENIZED),
    _over("Tokenizer, over gigatoken", "tokenizer", "gigatoken", 1.5, **TOKENIZED),
    _of_cpu(
        "Tokenizer, two threads over one",
        "≥",
        1.8,
        "×",
        quotient(
            "tokenizer",
            "per_second",
            {"threads": 2},
            {"threads": 1},
            provider="fastclip",
            corpus="captions",
        ),
    ),
    _of_cpu(
        "Tokenizer, time to make one",
        "≤",
        10,
        "ms",
        value("tokenizer", "construct_ms", provider="fastclip", **TOKENIZED),
    ),
    _of_cpu(
        "Tokenizer, memory",
        "≤",
        8,
        "MB",
        value("tokenizer", "memory_mb", provider="fastclip", **TOKENIZED),
    ),
    *(
        _over(
            f"JPEG to a crop, over open_clip's, {case}",
            "loader",
            "open_clip",
            least,
            part="decode",
            case=case,
        )
        for case, least in (("small", 3), ("large", 3.4), ("shrunk", 3.4))
    ),
    _over(
        "Members out of shards, over webdataset",
        "loader",
        "webdataset",
        10,
        part="read",
        case="small",
    ),
    _of_cpu(
        "Training batches, two cores over one",
        "≥",
        1.8,
        "×",
        quotient(
            "loader",
            "per_second",
            {"cores": 2},
            {"cores": 1},
            provider="fastclip",
            part="load",
            case="small",
        ),
    ),
    _of_cpu(
        "First batch out of 10,000 shards",
        "≤",
        1,
        "s",
        value(
            "loader",
            "seconds",
            provider="fastclip",
            part="start",
            case="10,000 shards, first batch",
        ),
    ),
    _of_cpu(
        "Captions matched with 500,000 queries",
        "≥",
        0.5,
        "M/s",
        value("phrases", "per_second", 1e-6, provider="fastclip", corpus="captions"),
    ),
    *(
        _of_cpu(
            f"Search among a million images{what}",
            sense,
            asked,
            unit,
            value("search", column, times, **FOUND),
        )
        for what, sense, asked, unit, column, times in SEARCH
    ),
    _of_cpu(
        "Linear probe with its search, 10,000 × 512, 100 classes",
        "≤",
        120,
        "s",
        value("probe", "median_ms", 1e-3, provider="fastclip", images=10_000, width=512),
    ),
)
