"""What follows the end of text is without influence; the end is the first largest id."""

from __future__ import annotations

import pytest
import torch

from fastclip.models.config import TextConfig
from fastclip.models.text import TextTransformer

CONFIG = TextConfig(context_length=16, vocab_size=50, width=24, heads=2, layers=3)
END = 49


@pytest.fixture
def tower() -> TextTransformer:
    return TextTransformer(CONFIG, embed_dim=10, projection="linear")


def ended(*lengths: int) -> torch.Tensor:
    ids = torch.randint(1, END, (len(lengths), 16))
    for row, length in enumerate(lengths):
        ids[row, length - 1] = END
        ids[row, length:] = 0
    return ids


def test_trimming_to_the_longest_text_changes_no_feature_and_no_gradient(tower):
    ids = ended(3, 7, 5, 1)
    results = []
    for tokens in (ids, ids[:, :7], ids[:, :12].int()):
        tower.zero_grad()
        features = tower(tokens)
        features.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in tower.named_parameters()}
        results.append((features.detach(), gradients))
    full, full_gradients = results[0]
    for trimmed, gradients in results[1:]:
        assert (trimmed - full).norm() < 1e-6 * full.norm()
        for name, gradient in gradients.items():
            error = (gradient - full_gradients[name]).norm() / full_gradients[name].norm()
            assert error < 1e-5, name


def test_what_follows_the_end_is_ignored(tower):
    ids = ended(3, 7)
    other = ids.clone()
    other[0, 3:] = torch.randint(0, END + 1, (13,))  # may repeat the end of text: the first counts
    other[0, 9] = END
    assert torch.allclose(tower(ids), tower(other), rtol=1e-6, atol=1e-8)


def test_what_precedes_the_end_is_not_ignored(tower):
    ids = ended(5)
    for position in range(4):
        other = ids.clone()
        other[0, position] = (int(other[0, position]) % (END - 1)) + 1
        assert not torch.allclose(tower(ids), tower(other), rtol=1e-4)


def test_the_largest_id_is_read_out_without_an_end(tower):
    ids = ended(9)
    ids[0] = torch.arange(16)  # the largest id stands last
    states = []
    hook = tower.ln_final.register_forward_hook(lambda m, inputs, o: states.append(inputs[0]))
    stream = []
    block = tower.blocks[-2].register_forward_hook(lambda m, i, output: stream.append(output))
    tower(ids)
    hook.remove()
    block.remove()
    every_position = tower.blocks[-1](stream[0])
    torch.testing.assert_close(states[0], every_position[:, 15])
