"""The five objectives that are compared: one image tower, five ways to learn from captions.

The image tower is the same for all of them, its last linear projection included, and has the same
initial weights for one seed. What stands behind it is the objective's own:

``language_model``
    The features become four prefix tokens of a causal transformer that predicts the caption (arXiv
    2103.00020, appendix A.2; the decoder is as large as the demo's text tower, its output embedding
    is its input embedding).
``bag_of_words``
    One linear layer gives a softmax over all tokens, against the caption's normalised bag of
    tokens. Joulin et al. (arXiv 1511.02251) found this loss better than a sigmoid for each word;
    theirs draws one word of the bag at a time, of which this is the expectation.
``bag_of_words_contrastive``
    CLIP's loss with a continuous bag of words as the text encoder: the mean of the tokens'
    embeddings, then a linear layer.
``transformer_contrastive``
    CLIP.
``convirt``
    ConVIRT (arXiv 2010.00747) as far as it differs from CLIP: projections with one hidden layer, a
    temperature fixed at 0.1, image-to-text weighted 0.75 and text-to-image 0.25, flips and colour
    jitter, one random sentence of the caption. Not kept: its pre-trained towers, affine
    transformations and blur; crops are those of all other objectives.

Texts are in ids of a `Vocabulary`. Start and end of text belong to no bag of words.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.losses import ClipLoss
from fastclip.models.clip import bounded_exp
from fastclip.models.config import ClipConfig, ResNetConfig
from fastclip.models.layers import LayerNorm, ResidualBlock
from fastclip.models.resnet import ModifiedResNet
from fastclip.models.text import TextTransformer

Objective = Literal[
    "language_model",
    "bag_of_words",
    "bag_of_words_contrastive",
    "transformer_contrastive",
    "convirt",
]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

PREFIX_TOKENS = 4
CONVIRT_TEMPERATURE = 0.1
CONVIRT_IMAGE_TO_TEXT = 0.75
UNKNOWN = 0
"""Stands for padding and for every token that no training caption has."""


class Vocabulary:
    """The tokens of the training captions, numbered anew; all others are one, `UNKNOWN`.

    The end of text stays the largest id, as `TextTransformer` needs. A token that training never
    shows would have an untrained embedding otherwise, and cost its share of every softmax.
    """

    def __init__(self, tokens: Tensor, vocab_size: int) -> None:
        """`tokens` are those that occur, any shape, specials included; ids below `vocab_size`."""
        known = tokens.unique()
        self._new = torch.full((vocab_size,), UNKNOWN, dtype=torch.int64)
        self._new[known.long()] = torch.arange(1, len(known) + 1)
        self.size = len(known) + 1

    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Rows of the tokenizer [B, L] with their lengths -> int64 [B, L], padded with UNKNOWN."""
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        return self._new[tokens.long()].where(inside, torch.tensor(UNKNOWN))


class ImageTower(nn.Module):
    """Pixels uint8 [B, 3, R, R] -> features [B, embed_dim], not of unit length.

    Raises:
        ValueError: the configuration's image tower is no ResNet.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        if not isinstance(config.vision, ResNetConfig):
            raise ValueError("the objectives are compared on a ResNet, as in the paper's Figure 2")
        self.net = ModifiedResNet(config.vision, config.embed_dim, "linear")
        # Convolutions on a CPU are a third faster so; the numbers' meaning is the same.
        self.net = self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        self._gain: Tensor
        self._shift: Tensor
        self.register_buffer("_gain", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("_shift", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalises the pixels, too; floating point ones in [0, 255] will do."""
        pixels = (images * self._gain).add_(self._shift)
        return self.net(pixels.contiguous(memory_format=torch.channels_last))


class LanguageModelHead(nn.Module):
    """Image features as the prefix of a causal transformer over the caption's tokens.

    The last prefix token predicts the caption's first one; a start of text would add nothing.
    """

    def __init__(self, config: ClipConfig, vocabulary: int) -> None:
        super().__init__()
        text = config.text
        self.width = text.width
        self.prefix = nn.Linear(config.embed_dim, PREFIX_TOKENS * text.width)
        self.token_embedding = nn.Embedding(vocabulary, text.width)
        positions = PREFIX_TOKENS + text.context_length
        self.positional_embedding = nn.Parameter(torch.empty(positions, text.width))
        self.blocks = nn.ModuleList(
            ResidualBlock(
                text.width, text.heads, text.mlp_width, text.activation,
                causal=True, depth=text.layers,
            )
            for _ in range(text.layers)
        )  # fmt: skip
        self.ln_final = LayerNorm(text.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def decoder_blocks(self) -> list[ResidualBlock]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, ResidualBlock)]

    def prefix_tokens(self, features: Tensor) -> Tensor:
        """Features [B, embed_dim] -> [B, 4, width], positions not yet added."""
        return self.prefix(features).view(len(features), PREFIX_TOKENS, self.width)

    def log_probabilities(self, features: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Of each token after the start of text given the image and those before it: [B, L - 1].

        Zero for padding. Args as in `forward`.
        """
        inputs = self.token_embedding(tokens[:, 1:-1])
        x = torch.cat([self.prefix_tokens(features), inputs], dim=1)
        x = x + self.positional_embedding[: x.shape[1]]
        for block in self.decoder_blocks():
            x = block(x)
        inside = _inside(tokens[:, 1:], lengths - 1)
        # Of padding no logits: they would be most of the work.
        logits = self.logits(x[:, PREFIX_TOKENS - 1 :][inside])
        losses = F.cross_entropy(logits, tokens[:, 1:][inside], reduction="none")
        return torch.zeros(inside.shape, dtype=x.dtype).masked_scatter(inside, -losses)

    def logits(self, x: Tensor) -> Tensor:
        """What leaves the last block [..., width] -> [..., vocabulary]."""
        return F.linear(self.ln_final(x), self.token_embedding.weight)

    def forward(self, features: Tensor, tokens: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        """Mean cross entropy of a token, the end of text included, padding not: [].

        Args:
            features: [B, embed_dim].
            tokens: int64 [B, L], the start of text first.
            lengths: [B], start and end included.
            ids: int64 [B], equal for pairs that are positives of each other; not used here.
        """
        del ids
        return -self.log_probabilities(features, tokens, lengths).sum() / (lengths - 1).sum()


class BagOfWordsHead(nn.Module):
    """A linear layer whose softmax predicts the words of the caption."""

    def __init__(self, config: ClipConfig, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Linear(config.embed_dim, vocabulary)
        nn.init.normal_(self.words.weight, std=config.embed_dim**-0.5)
        nn.init.zeros_(self.words.bias)

    def log_probabilities(self, features: Tensor) -> Tensor:
        """[B, embed_dim] -> of each word, [B, vocabulary]."""
        return F.log_softmax(self.words(features), dim=-1)

    def forward(self, features: Tensor, tokens: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        """Mean over images of the cross entropy against their normalised bags: []. Args as above.

        A caption without words has an empty bag and adds nothing.
        """
        del ids
        bags = bags_of_words(tokens, lengths, self.words.out_features)
        return -(bags * self.log_probabilities(features)).sum() / len(features)


class ContinuousBagOfWords(nn.Module):
    """The mean of the words' embeddings, then a linear layer."""

    def __init__(self, config: ClipConfig, vocabulary: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.text.width)
        self.proj = nn.Linear(config.text.width, config.embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.proj.weight, std=config.text.width**-0.5)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """int64 [B, L], [B] -> [B, embed_dim]; zeros for a text without words."""
        inside = _words(tokens, lengths)[..., None]
        total = (self.token_embedding(tokens) * inside).sum(dim=1)
        return self.proj(total / inside.sum(dim=1).clamp(min=1))


class ContrastiveHead(nn.Module):
    """CLIP's symmetric loss with a learned temperature, behind either text encoder."""

    def __init__(self, config: ClipConfig, text: ContinuousBagOfWords | TextTransformer) -> None:
        super().__init__()
        self.text = text
        self.max_logit_scale = config.max_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(config.init_temperature)]))
        self.loss = ClipLoss(normalize=True)

    def embed_images(self, features: Tensor) -> Tensor:
        """[B, embed_dim] -> the same, of unit length."""
        return F.normalize(features, dim=-1)

    def embed_texts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """int64 [B, L], [B] -> [B, embed_dim], of unit length."""
        return F.normalize(_encode(self.text, tokens, lengths), dim=-1)

    def forward(self, features: Tensor, tokens: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        """The loss, []; args as in `LanguageModelHead.forward`."""
        scale = bounded_exp(self.logit_scale, self.max_logit_scale)
        loss = self.loss(features, _encode(self.text, tokens, lengths), scale, ids=ids)
        assert isinstance(loss, Tensor)
        return loss


class ConvirtHead(nn.Module):
    """ConVIRT's projections and loss.

    The image's hidden layer is the tower's own last projection, which the other objectives have.
    """

    def __init__(self, config: ClipConfig, text: TextTransformer) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.ReLU(), nn.Linear(config.embed_dim, config.embed_dim))
        self.text = text

    def embed_images(self, features: Tensor) -> Tensor:
        """[B, embed_dim] -> the same, of unit length."""
        return F.normalize(self.image(features), dim=-1)

    def embed_texts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """int64 [B, L], [B] -> [B, embed_dim], of unit length."""
        del lengths
        return F.normalize(self.text(tokens), dim=-1)

    def forward(self, features: Tensor, tokens: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        """The loss, []; args as in `LanguageModelHead.forward`.

        Pairs of one label are positives of each other, as they are for the other objectives.
        """
        images, texts = self.embed_images(features), self.embed_texts(tokens, lengths)
        return weighted_contrastive_loss(
            images @ texts.T / CONVIRT_TEMPERATURE, ids, image_to_text=CONVIRT_IMAGE_TO_TEXT
        )


class ObjectiveModel(nn.Module):
    """The image tower and an objective's head.

    Attributes:
        objective: whose head it is.
    """

    def __init__(self, objective: Objective, config: ClipConfig, vocabulary: int) -> None:
        super().__init__()
        self.objective: Objective = objective
        self.visual = ImageTower(config)  # first, so that one seed gives all of them one tower
        self.head = _build_head(objective, config, vocabulary)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        """The loss of a batch, []: pixels [B, 3, R, R], ids of the vocabulary int64 [B, L]."""
        return self.head(self.visual(images), tokens, lengths, ids)


Head = LanguageModelHead | BagOfWordsHead | ContrastiveHead | ConvirtHead


def _build_head(objective: Objective, config: ClipConfig, vocabulary: int) -> Head:
    text = dataclasses.replace(config.text, vocab_size=vocabulary)
    match objective:
        case "language_model":
            return LanguageModelHead(config, vocabulary)
        case "bag_of_words":
            return BagOfWordsHead(config, vocabulary)
        case "bag_of_words_contrastive":
            return ContrastiveHead(config, ContinuousBagOfWords(config, vocabulary))
        case "transformer_contrastive":
            return ContrastiveHead(config, TextTransformer(text, config.embed_dim, "linear"))
        case "convirt":
            return ConvirtHead(config, TextTransformer(text, config.embed_dim, "mlp"))


def bags_of_words(tokens: Tensor, lengths: Tensor, vocabulary: int) -> Tensor:
    """Share of each word among a text's words, fp32 [B, vocabulary]; zeros without words."""
    inside = _words(tokens, lengths).float()
    shares = inside / inside.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.zeros(len(tokens), vocabulary).scatter_add_(1, tokens, shares)


def weighted_contrastive_loss(logits: Tensor, ids: Tensor, *, image_to_text: float) -> Tensor:
    """Softmax losses of both directions, weighted: [].

    Args:
        logits: [B, B], images by texts.
        ids: int64 [B]; pairs with equal ids share a row's target evenly.
        image_to_text: weight of choosing a text for an image; the other has 1 minus that.
    """
    targets = (ids[:, None] == ids).float()
    targets = targets / targets.sum(dim=1, keepdim=True)
    choose_text = F.cross_entropy(logits, targets)
    choose_image = F.cross_entropy(logits.T, targets)
    return image_to_text * choose_text + (1 - image_to_text) * choose_image


def convirt_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped or not, its brightness and contrast changed: [B, 3, R, R], fp32.

    ConVIRT's flip with probability 0.5 and jitter by factors in [0.6, 1.4], applied to uint8
    pixels; the results stay in [0, 255]. All draws come from `generator`.
    """
    count = len(images)
    draws = torch.rand(3, count, generator=generator)
    flip = (draws[0] < 0.5).view(-1, 1, 1, 1)
    brightness, contrast = (0.6 + 0.8 * draws[1:]).view(2, -1, 1, 1, 1)
    pixels = images.float()
    pixels = torch.where(flip, pixels.flip(-1), pixels) * brightness
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return ((pixels - mean) * contrast + mean).clamp_(0, 255)


def _encode(
    text: ContinuousBagOfWords | TextTransformer, tokens: Tensor, lengths: Tensor
) -> Tensor:
    return text(tokens, lengths) if isinstance(text, ContinuousBagOfWords) else text(tokens)


def _inside(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Bool [B, L]: which positions come before a row's length."""
    return torch.arange(tokens.shape[1]) < lengths[:, None]


def _words(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Bool [B, L]: which positions are neither padding nor start or end of text."""
    inside = _inside(tokens, lengths - 1)
    inside[:, 0] = False
    return inside
