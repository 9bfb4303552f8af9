"""AdamW in eight bytes a parameter: rounding without bias, and fp32's loss curve."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastclip.engine import build_engine
from fastclip.kernels import reference_optim
from fastclip.kernels.reference_optim import random_bits, round_stochastically
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.ops.compact_adamw import compact_adamw_group
from fastclip.optim import CompactAdamW, OptimConfig, build_optimizer, parameter_groups
from fastclip.optim.compact import store_compactly
from ranks import run_ranks
from small_towers import engine_config

CPU = torch.device("cpu")


def test_rounding_goes_to_a_neighbour_and_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    values = torch.randn(2000) * torch.logspace(-30, 30, 2000)
    total = torch.zeros(2000, dtype=torch.float64)
    rounded = values.bfloat16()
    draws = 4096
    for draw in range(draws):
        bits, _ = random_bits(2000, 7, torch.tensor(float(draw)))
        rounded = round_stochastically(values, bits)
        assert rounded.dtype == torch.bfloat16
        total += rounded.double()
    low = (values.view(torch.int32) & -65536).view(torch.float32)
    unit = low.abs().double() * 2**-7  # at least the distance of neighbours
    assert ((rounded.double() - values.double()).abs() <= unit).all()
    off = (total / draws - values.double()).abs() / unit
    assert off.max() < 0.05  # five standard deviations of the mean, 0.5 / sqrt(4096) at most


def test_what_bfloat16_holds_stays() -> None:
    exact = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, 1e38])])
    exact = exact.bfloat16().float()
    for draw in range(20):
        bits, _ = random_bits(exact.numel(), 3, torch.tensor(float(draw)))
        assert torch.equal(round_stochastically(exact, bits).float(), exact)


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0xFFC00000, 0x7F800001])
def test_a_nan_stays_one(pattern: int) -> None:
    """Of a GPU, which is 0x7FFFFFFF, and of a CPU."""
    x = torch.full((65536,), pattern, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert x.isnan().all()
    assert round_stochastically(x, torch.arange(65536, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_stays(sign: int) -> None:
    x = torch.full((65536,), sign * torch.inf)
    rounded = round_stochastically(x, torch.arange(65536, dtype=torch.int32))
    assert torch.equal(rounded.float(), x)


def test_bits_differ_between_elements_tensors_and_updates() -> None:
    drawn = [
        torch.cat(random_bits(50_000, seed, torch.tensor(float(step))))
        for seed in (1, 2)
        for step in (1, 2)
    ]
    assert len(torch.cat(drawn).unique()) > 0.9998 * 400_000  # as many as chance leaves
    for x in drawn:
        for bit in range(32):
            assert abs(float(((x >> bit) & 1).double().mean()) - 0.5) < 0.01


def _update(x: torch.Tensor, **changes: float | torch.Tensor) -> list[torch.Tensor]:
    """The operator on `x`, its gradient and statistics; the three that it changes."""
    torch.manual_seed(1)
    parameter, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    given = {"step": torch.tensor(1.0), "divisor": torch.tensor(1.0), "skip": torch.tensor(0.0)}
    tensors = {key: changes.pop(key, value) for key, value in given.items()}
    gradient = torch.as_tensor(changes.pop("gradient", torch.randn(x.shape)), dtype=x.dtype)
    numbers = {
        "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2,
    }  # fmt: skip
    numbers |= {name: changes.pop(name) for name in numbers if name in changes}
    seed = changes.pop("seed", 11)
    assert not changes
    step, divisor, skip = tensors.values()
    compact_adamw_group(
        [parameter], [gradient], [m], [v], [step], [seed], divisor, skip, *numbers.values(), "auto"
    )
    return [parameter, m, v]


def test_fp32_parts_are_updated_as_torch_does() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40))
    expected = torch.nn.Parameter(weight.detach().clone())
    settings = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    mine = CompactAdamW([{"params": [weight]}], **settings)
    theirs = torch.optim.AdamW([expected], **settings)
    for _ in range(5):
        weight.grad = torch.randn(40)
        expected.grad = weight.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


def test_a_bad_gradient_changes_nothing_and_is_not_counted() -> None:
    weight = torch.nn.Parameter(torch.randn(30, 20).bfloat16())
    optimizer = CompactAdamW(
        [{"params": [weight]}], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )
    states = []
    for bad in (0.0, 1.0, 0.0):
        weight.grad = torch.full_like(weight, torch.nan if bad else 1.0)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        state = optimizer.state[weight]
        states.append([t.clone() for t in (weight, *state.values())])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not torch.equal(states[1][0], states[2][0])
    assert float(optimizer.state[weight]["step"]) == 2.0


def test_the_divisor_is_the_loss_scale() -> None:
    x = torch.randn(50, 3).bfloat16()
    gradient = torch.randn(50, 3).bfloat16()
    scaled = _update(x, gradient=gradient * 8, divisor=torch.tensor(8.0))
    assert all(
        torch.equal(a, b) for a, b in zip(scaled, _update(x, gradient=gradient), strict=True)
    )


def test_small_updates_add_up() -> None:
    """A thousand steps, each a hundredth of what bfloat16 can tell from a weight of 1."""
    weight = torch.nn.Parameter(torch.ones(2000, 2).bfloat16())
    optimizer = CompactAdamW(
        [{"params": [weight]}], lr=4e-5, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.0
    )
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Five standard deviations of the mean. Rounded to nearest, no weight would have moved.
    assert float(weight.detach().double().mean()) == pytest.approx(0.96, abs=1e-3)


def test_a_step_is_one_update_of_each_tensor(monkeypatch) -> None:
    """In one call for a group, whatever has a gradient, and each with its own count and seed."""
    shapes = [(3, 5), (7,), (2, 2), (4,), (6, 1)]
    weights = [
        torch.nn.Parameter(torch.randn(shape).to(torch.bfloat16 if len(shape) > 1 else None))
        for shape in shapes
    ]
    expected = [[w.detach().clone(), torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    groups = [
        {"params": weights[:3], "weight_decay": 0.3},
        {"params": [], "weight_decay": 0.2},
        {"params": weights[3:], "lr": 0.01},
    ]
    optimizer = CompactAdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    calls = []

    def spied(*arguments) -> None:
        calls.append(len(arguments[0]))
        compact_adamw_group(*arguments)

    monkeypatch.setattr("fastclip.optim.compact.compact_adamw_group", spied)
    counts = [0] * len(weights)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for without in (None, 1, 3):
        for number, weight in enumerate(weights):
            weight.grad = None if number == without else torch.randn_like(weight)
        optimizer.step()
        for number, (weight, tensors) in enumerate(zip(weights, expected, strict=True)):
            if weight.grad is None:
                continue
            counts[number] += 1
            settings = (0.1, 0.9, 0.98, 1e-6, 0.3) if number < 3 else (0.01, 0.9, 0.98, 1e-6, 0.1)
            reference_optim.compact_adamw(
                tensors[0], weight.grad, tensors[1], tensors[2],
                torch.tensor(float(counts[number])), one, zero, *settings,
                (number + 1) * 0x9E3779B1 % 2**31,
            )  # fmt: skip
    assert calls == [3, 2, 2, 2, 3, 1]
    for weight, tensors in zip(weights, expected, strict=True):
        state = optimizer.state[weight]
        for mine, other in zip(
            (weight, state["exp_avg"], state["exp_avg_sq"]), tensors, strict=True
        ):
            assert torch.equal(mine, other)


def test_eight_bytes_a_parameter() -> None:
    model = Clip(preset("ViT-B-32"))
    store_compactly(model)
    count = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 2.0 <= weights / count < 2.02
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert model.logit_scale.dtype == torch.float32
    assert OptimConfig(algorithm="compact_adamw").bytes_per_parameter == 6
    config = OptimConfig(algorithm="compact_adamw")
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    assert isinstance(optimizer, CompactAdamW)
    parameter = model.text.token_embedding.weight
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[parameter][key].dtype == torch.bfloat16


STEPS, BATCH, CLASSES = 120, 32, 96


def _losses(runtime, algorithm: str, learning_rate: float, steps: int) -> list[float]:
    """Of a small model that learns which of 96 noisy pictures goes with which caption."""
    torch.manual_seed(0)
    config = preset("ViT-Nano-8")
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=2),
        text=dataclasses.replace(config.text, layers=2, vocab_size=1000),
    )
    model = Clip(config).train()
    side, vocabulary = config.vision.image_size, config.text.vocab_size
    pictures = torch.randint(0, 256, (CLASSES, 3, side, side)).float()
    captions = torch.randint(1, vocabulary - 2, (CLASSES, 6))
    captions[:, -1] = vocabulary - 1
    optim = OptimConfig(algorithm=algorithm, learning_rate=learning_rate, beta2=0.98)  # pyright: ignore[reportArgumentType]
    engine = build_engine(
        model, optim, engine_config("plain", precision="bf16"), runtime, micro_batch_size=BATCH
    )
    losses = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randperm(CLASSES, generator=generator)[:BATCH]
        noise = 60 * torch.randn(BATCH, 3, side, side, generator=generator)
        images = (pictures[chosen] + noise).clamp(0, 255).to(torch.uint8)
        output = engine.forward(images, captions[chosen])
        assert output.image_features is not None
        assert output.text_features is not None
        logits = output.logit_scale * output.image_features @ output.text_features.T
        target = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def _curves(runtime, steps: int) -> dict[str, list[float]]:
    return {name: _losses(runtime, name, 3e-4, steps) for name in ("adamw", "compact_adamw")}


@pytest.mark.parametrize(
    "steps", [STEPS, pytest.param(2040, marks=(pytest.mark.slow, pytest.mark.timeout(1800)))]
)
def test_its_loss_curve_follows_fp32s(steps, tmp_path) -> None:
    (curves,) = run_ranks(_curves, 1, tmp_path, steps)
    whole, compact = (torch.tensor(curves[name]) for name in ("adamw", "compact_adamw"))
    smooth = [x.view(12, -1).mean(1) for x in (whole, compact)]
    print("fp32:   ", " ".join(f"{x:.3f}" for x in smooth[0]))
    print("compact:", " ".join(f"{x:.3f}" for x in smooth[1]))
    assert smooth[0][-1] < 0.5 * smooth[0][0]  # it learns
    assert ((smooth[1] - smooth[0]).abs() < 0.05 * smooth[0][0]).all()


def test_other_precisions_are_refused() -> None:
    from fastclip.engine.config import choose_backend

    optim = OptimConfig(algorithm="compact_adamw")
    with pytest.raises(ValueError, match=r"compact_adamw needs engine\.precision=bf16"):
        choose_backend(engine_config("plain", precision="fp32"), 1, optim)
    with pytest.raises(ValueError, match=r"under DeepSpeed it needs engine\.zero_stage=0"):
        choose_backend(engine_config(1, precision="bf16"), 2, optim)


def test_the_operators_pass_torchs_checks() -> None:
    checks = ("test_schema", "test_faketensor")
    one, zero, settings = torch.tensor(1.0), torch.tensor(0.0), (0.1, 0.9, 0.98, 1e-6, 0.1)
    groups = [[], [], [], [], []]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(7, 3).to(dtype)
        tensors = (x, x * 0.1, torch.zeros_like(x), torch.zeros_like(x), one.clone())
        for some, tensor in zip(groups, tensors, strict=True):
            some.append(tensor)
    torch.library.opcheck(
        compact_adamw_group,
        (*groups, [5, 6], one, zero, *settings, "reference"),
        test_utils=checks,
    )
