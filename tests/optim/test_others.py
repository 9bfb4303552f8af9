"""LAMB, and the optimisers that DeepSpeed and apex bring."""

from __future__ import annotations

import dataclasses
import math
import sys
import types

import pytest
import torch

from fastclip.engine import build_engine
from fastclip.engine.config import choose_backend
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.nvidia_apex import find_layer_norm, find_optimizer
from fastclip.optim import (
    Lamb,
    OptimConfig,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from ranks import run_ranks
from small_towers import Place, engine_config, product_loss

CPU = torch.device("cpu")
BETAS, EPS, RATE, DECAY = (0.9, 0.98), 1e-6, 0.05, 0.3


def _lamb_by_hand(weight, gradients, decay):
    """LAMB's steps in fp64, as its paper writes them."""
    weight = weight.double()
    m = v = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        update = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
        ratio = 1.0
        if decay:
            update = update + decay * weight
            ratio = weight.norm() / update.norm()
        weight = weight - RATE * ratio * update
    return weight


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_lamb_is_the_papers(decay):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20, 10))
    gradients = [torch.randn(20, 10) for _ in range(6)]
    expected = _lamb_by_hand(weight.detach(), gradients, decay)
    optimizer = Lamb(
        [{"params": [weight], "weight_decay": decay}],
        lr=RATE, betas=BETAS, eps=EPS, weight_decay=1.0,
    )  # fmt: skip
    for number, gradient in enumerate(gradients):
        if number == 3:  # a step that is skipped in between is as none
            weight.grad = torch.full_like(weight, torch.nan)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.grad_scale = torch.tensor(4.0)
        weight.grad = gradient * 4
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert float(optimizer.state[weight]["step"]) == 6.0


def test_lamb_moves_weights_that_are_zero():
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = Lamb([{"params": [weight]}], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), -RATE), rtol=1e-4, atol=0)


def _trained(runtime, place: Place, optim: OptimConfig, precision: str = "fp32"):
    """Losses of some steps, and weights in the end, also after going on from a saved state."""
    torch.manual_seed(0)
    config = preset("ViT-Nano-8")
    text = dataclasses.replace(config.text, layers=2, vocab_size=1000)
    vision = dataclasses.replace(config.vision, layers=2)
    model = Clip(dataclasses.replace(config, text=text, vision=vision)).train()
    engine = build_engine(
        model,
        optim,
        engine_config(place, precision=precision),
        runtime,
        micro_batch_size=8 // runtime.world_size,
    )
    share = 8 // runtime.world_size
    rows = slice(runtime.rank * share, (runtime.rank + 1) * share)
    losses = []
    for step in range(8):
        set_learning_rate(engine.optimizer, step, optim, 20)
        torch.manual_seed(step % 2)
        side = config.vision.image_size
        images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8)
        tokens = torch.randint(1, 1000, (8, 5))
        output = engine.forward(images[rows], tokens[rows])
        loss = product_loss(output, share)
        engine.backward(loss)
        info = engine.step()
        assert bool(info.applied)
        losses.append(float(loss.detach()))
    weights = engine.full_state_dict()
    rates = {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
    engine.close()
    return losses, weights, rates


def _several(runtime):
    compact = OptimConfig(algorithm="compact_adamw", learning_rate=1e-2, warmup_steps=0)
    lamb = OptimConfig(algorithm="lamb", learning_rate=1e-2, warmup_steps=0)
    found = {"compact": _trained(runtime, 0, compact, "bf16"), "lamb": _trained(runtime, 0, lamb)}
    if runtime.world_size == 1:
        found["plain compact"] = _trained(runtime, "plain", compact, "bf16")
        found["plain lamb"] = _trained(runtime, "plain", lamb)
    return found


def test_unsharded_optimisers_are_the_same_on_every_engine(tmp_path):
    (alone,) = run_ranks(_several, 1, tmp_path)
    both = run_ranks(_several, 2, tmp_path)
    for name in ("compact", "lamb"):
        _, one, _ = alone[f"plain {name}"]
        for label, (_, weights, _) in (("ZeRO 0", alone[name]), ("two ranks", both[0][name])):
            error, norm = (
                math.sqrt(sum(float(x.norm()) ** 2 for x in tensors))
                for tensors in ([weights[k] - one[k] for k in one], list(one.values()))
            )
            print(f"{name}, {label}: {error / norm:.1e}")
            # Gradients in bfloat16 are averaged over ranks in it.
            limit = 1e-6 if label == "ZeRO 0" else 1e-2 if name == "compact" else 1e-4
            assert error < limit * norm, (name, label)


MUON = OptimConfig(
    algorithm="muon", learning_rate=1e-3, muon_learning_rate=0.02, warmup_steps=0,
    weight_decay=0.1, text_lr_scale=0.5,
)  # fmt: skip


def _muon(runtime):
    places: tuple[Place, ...] = (1, 2, 3)
    return {place: _trained(runtime, place, MUON) for place in places}


def test_muon_trains_and_is_the_same_at_every_stage(tmp_path):
    results = run_ranks(_muon, 2, tmp_path)[0]
    _, expected, _ = results[1]
    for stage, (losses, weights, rates) in results.items():
        print(f"ZeRO {stage}: {losses[0]:.4f} to {losses[-1]:.4f}")
        assert losses[-1] < losses[0] - 0.02
        fraction = rates["visual/decay"] / 1e-3
        assert 0 < fraction < 1
        assert rates["visual/decay/muon"] == pytest.approx(0.02 * fraction)
        assert rates["text/decay/muon"] == pytest.approx(0.01 * fraction)
        for name, tensor in expected.items():
            # Newton-Schulz runs in bfloat16, on gradients that differ in the last bit.
            difference = float((weights[name] - tensor).norm() / tensor.norm().clamp(min=1e-3))
            assert difference < 0.02, (stage, name, difference)


def test_what_muon_updates():
    model = Clip(preset("ViT-Nano-8"))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, MUON)
    hidden = [names[id(p)] for g in groups if g["use_muon"] for p in g["params"]]
    assert hidden
    assert all(".blocks." in n and n.endswith("weight") for n in hidden)
    assert sum(len(g["params"]) for g in groups) == len(names)
    for group in groups:
        if group["use_muon"]:  # a step's decay is the learning rate times this
            assert group["weight_decay"] * 0.02 == pytest.approx(0.1 * 1e-3)


@pytest.mark.parametrize(
    ("optim", "place", "message"),
    [
        ({"algorithm": "muon"}, 0, r"muon needs engine\.zero_stage 1, 2 or 3"),
        ({"algorithm": "muon"}, "plain", r"needs engine\.backend=deepspeed"),
        ({"implementation": "deepspeed"}, "plain", r"needs engine\.backend=deepspeed"),
        ({"algorithm": "lamb"}, 2, r"lamb works on whole parameters"),
    ],
)
def test_what_does_not_go_together(optim, place, message):
    config = engine_config(place, precision="bf16")
    with pytest.raises(ValueError, match=message):
        choose_backend(config, 1, OptimConfig(**optim))


@pytest.mark.parametrize(
    ("algorithm", "implementation"),
    [("muon", "torch"), ("compact_adamw", "apex"), ("lamb", "deepspeed"), ("sgd", "auto")],
)
def test_implementations_that_do_not_exist(algorithm, implementation):
    with pytest.raises(ValueError, match=r"optim\.(implementation of|algorithm is)"):
        OptimConfig(algorithm=algorithm, implementation=implementation)


def test_deepspeeds_optimiser_is_described_not_made():
    groups = parameter_groups(Clip(preset("ViT-Nano-8")), OptimConfig())
    described = build_optimizer(groups, OptimConfig(implementation="deepspeed"), CPU)
    assert not isinstance(described, torch.optim.Optimizer)
    assert described.kind == "AdamW"
    assert described.arguments["betas"] == (0.9, 0.98)


class _Fused(torch.optim.SGD):
    """Stands for apex's: remembers what it was made with."""

    def __init__(self, params, **arguments):
        super().__init__(params, lr=arguments["lr"])
        self.arguments = arguments


def test_apex_is_used_where_its_compiled_part_is(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = optimizers.FusedLAMB = _Fused  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert find_optimizer("FusedAdam") is None  # the package without its extension
    assert find_layer_norm() is None
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    for algorithm, argument in (("adamw", "adam_w_mode"), ("lamb", "max_grad_norm")):
        config = OptimConfig(algorithm=algorithm, implementation="apex")  # pyright: ignore[reportArgumentType]
        made = build_optimizer([{"params": [weight]}], config, CPU)
        assert isinstance(made, _Fused)
        assert argument in made.arguments


def test_apexs_layer_norm_gets_fp32(monkeypatch):
    model = Clip(preset("ViT-Nano-8"))
    with pytest.raises(ImportError, match=r"run\.layer_norm=apex needs NVIDIA's apex"):
        model.use_apex_layer_norm()
    seen = []

    def fused(x, weight, bias, shape, eps):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.fused_layer_norm_affine = fused  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", types.ModuleType("x"))
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", module)
    model.autocast_dtype = torch.bfloat16
    side = model.config.vision.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    expected = model(images, torch.full((2, 5), 3)).image_features
    model.use_apex_layer_norm()
    assert torch.equal(model(images, torch.full((2, 5), 3)).image_features, expected)
    assert set(seen) == {(torch.float32, False)}


def test_muons_updates_are_not_clipped():
    config = engine_config(1, gradient_clipping=1.0)
    with pytest.raises(ValueError, match=r"muon needs engine\.gradient_clipping=0"):
        choose_backend(config, 2, OptimConfig(algorithm="muon"))
