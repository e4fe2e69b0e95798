"""Tokenizers: an item's embedding to D digits, each a codeword of a codebook of its level.

With z = E(x) and r_0 = z, level d takes the nearest codeword and leaves the rest:

    s_d = argmin_k ||r_{d-1} - e^d_k||^2,   r_d = r_{d-1} - e^d_{s_d},   zhat = sum_d e^d_{s_d}
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.errors import HpgrError

KMEANS_ITERATIONS = 20
STEPS_TO_DEATH = 20  # a codeword that no batch of so many used is put on a random rest


class Quantised(NamedTuple):
    """The residual quantisation of R vectors.

    Attributes:
        digits: int64 `[R, D]`.
        words: `[D, R, H]`, the codewords taken; their gradient goes to the codebooks.
        rests: `[D, R, H]`, r_{d-1}, what each level had to quantise.
    """

    digits: Tensor
    words: Tensor
    rests: Tensor


class ItemTokenizer(nn.Module):
    """The interface, and residual k-means (RQ-KMeans) as it is: what `fit_codebooks` fits is all.

    Inputs are centred, by a centre fixed with the codebooks, and brought to one length: the length
    of an item's row says how often it was trained, not what it is.

    Args:
        input_dim: size of the item embeddings.
        num_levels: D.
        codebook_size: K.
    """

    trains = False
    centre: Tensor
    unused_steps: Tensor

    def __init__(self, *, input_dim: int, num_levels: int = 3, codebook_size: int = 256) -> None:
        super().__init__()
        check_at_least(1, input_dim=input_dim, num_levels=num_levels, codebook_size=codebook_size)
        self.input_dim, self.num_levels = input_dim, num_levels
        self.codebook_size = codebook_size
        self.register_buffer("centre", torch.zeros(input_dim))
        self.codebooks = nn.Parameter(
            torch.zeros(num_levels, codebook_size, self.hidden_dim), requires_grad=self.trains
        )
        self.register_buffer("unused_steps", torch.zeros(num_levels, codebook_size))

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, for files; each is an attribute."""
        _, *names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names}

    @property
    def hidden_dim(self) -> int:
        """H, the size of codewords."""
        return self.input_dim

    def encode(self, embeddings: Tensor) -> Tensor:
        """z `[R, H]` of item embeddings `[R, input_dim]`."""
        return self.normalised(embeddings)

    def normalised(self, embeddings: Tensor) -> Tensor:
        """x, the embeddings `[R, input_dim]` centred and scaled to a mean square of 1."""
        return F.normalize(embeddings - self.centre, dim=1) * self.input_dim**0.5

    def digits(self, embeddings: Tensor) -> Tensor:
        """The digits of items, int64 `[R, D]`, also of items that were never trained on."""
        with torch.no_grad():
            return self.quantise(self.encode(embeddings)).digits

    def quantise(self, z: Tensor) -> Quantised:
        """Take the nearest codeword of every level, z `[R, H]`."""
        rest, digits, words, rests = z, [], [], []
        for codebook in self.codebooks:
            nearest = _distances(rest.detach(), codebook.detach()).argmin(1)
            word = F.embedding(nearest, codebook)
            digits.append(nearest)
            words.append(word)
            rests.append(rest)
            rest = rest - word.detach()
        return Quantised(torch.stack(digits, 1), torch.stack(words), torch.stack(rests))

    @torch.no_grad()
    def fit_codebooks(self, embeddings: Tensor, generator: torch.Generator) -> None:
        """Fix the centre, and fit every codebook by k-means to what the one before left.

        Args:
            embeddings: `[V, input_dim]` of all items.
            generator: on the CPU.
        """
        self.centre.copy_(embeddings.mean(0))
        rest = self.encode(embeddings)
        for codebook in self.codebooks:
            found = kmeans(rest, self.codebook_size, generator, from_groups=not self.trains)
            codebook.copy_(found)
            rest = rest - codebook[_distances(rest, codebook).argmin(1)]


class ResidualKMeans(ItemTokenizer):
    """Residual k-means on the embeddings themselves: the baseline without a network."""


class RQVAE(ItemTokenizer):
    """RQ-VAE: an encoder, residual quantisation and a decoder, with a loss for every level.

    L = ||xhat - x||^2 + sum_d ||sg(r_{d-1}) - e^d||^2 + commitment ||r_{d-1} - sg(e^d)||^2, means
    over items and dimensions.

    Args:
        input_dim, num_levels, codebook_size: see `ItemTokenizer`.
        latent_dim: H.
        network_dim: width of the two-layer encoder and decoder.
        commitment: weight of the encoder's part.
    """

    trains = True

    def __init__(
        self,
        *,
        input_dim: int,
        num_levels: int = 3,
        codebook_size: int = 256,
        latent_dim: int = 32,
        network_dim: int = 128,
        commitment: float = 0.25,
    ) -> None:
        check_at_least(1, latent_dim=latent_dim, network_dim=network_dim)
        check_at_least(0, commitment=commitment)
        self.latent_dim, self.network_dim = latent_dim, network_dim
        super().__init__(input_dim=input_dim, num_levels=num_levels, codebook_size=codebook_size)
        self.commitment = commitment
        self.encoder = _network(input_dim, network_dim, latent_dim)
        self.decoder = _network(latent_dim, network_dim, input_dim)

    @property
    def hidden_dim(self) -> int:
        """H."""
        return self.latent_dim

    def encode(self, embeddings: Tensor) -> Tensor:
        """See `ItemTokenizer.encode`."""
        z: Tensor = self.encoder(self.normalised(embeddings))
        return z

    def forward(self, anchors: Tensor, positives: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            anchors: `[R, input_dim]`.
            positives: `[R, input_dim]`, an item like each; rows that have none are NaN. Only a
                contrastive loss reads them.
        """
        z = self.encode(anchors)
        quantised = self.quantise(z)
        if self.training:
            self._reseed(quantised)
        zhat = quantised.words.sum(0)
        through = z + (zhat - z).detach()  # straight-through: the encoder gets zhat's gradient
        reconstruction = F.mse_loss(self.decoder(through), self.normalised(anchors))
        return reconstruction + self.quantisation_loss(z, quantised)

    def autoencoding_loss(self, embeddings: Tensor) -> Tensor:
        """||Dec(E(x)) - x||^2 without codebooks, which are better fitted to trained vectors."""
        return F.mse_loss(self.decoder(self.encode(embeddings)), self.normalised(embeddings))

    def quantisation_loss(self, z: Tensor, quantised: Quantised) -> Tensor:
        """What draws codewords and rests together, level by level."""
        words, rests = quantised.words, quantised.rests
        to_rests = (words - rests.detach()).square().mean((1, 2)).sum()
        to_words = (rests - words.detach()).square().mean((1, 2)).sum()
        return to_rests + self.commitment * to_words

    def reconstruction_error(self, embeddings: Tensor) -> Tensor:
        """||xhat - x||^2, a mean over items and dimensions of the scaled embeddings."""
        zhat = self.quantise(self.encode(embeddings)).words.sum(0)
        return F.mse_loss(self.decoder(zhat), self.normalised(embeddings))

    @torch.no_grad()
    def _reseed(self, quantised: Quantised) -> None:
        """Put codewords that no item takes any more on random rests of the batch."""
        for level, digits in enumerate(quantised.digits.unbind(1)):
            unused = self.unused_steps[level]
            unused += 1
            unused[digits] = 0
            dead = (unused >= STEPS_TO_DEATH).nonzero().squeeze(1)
            if len(dead):
                drawn = torch.randint(len(digits), (len(dead),)).to(digits.device)
                self.codebooks[level, dead] = quantised.rests[level, drawn]
                unused[dead] = 0


class CRQVAE(RQVAE):
    """CRQ-VAE, the tokenizer of HiGR: one loss over the sum of codewords, and a contrastive one.

    L = ||xhat - x||^2 + global_weight L_global + contrastive_weight L_cont, with
    L_global = ||zhat - sg(z)||^2 + commitment ||z - sg(zhat)||^2 and, over all levels but the last,

        L_cont = -1/(D-1) sum_d w_d log[ psi(e_a, e_p) / (psi(e_a, e_p) + sum_n psi(e_a, e_n)) ],

    psi = exp(cos / temperature) on the codewords of level d; the negatives are the batch.

    Args:
        input_dim, num_levels, codebook_size, latent_dim, network_dim: see `RQVAE`.
        commitment: eta.
        global_weight: lambda1.
        contrastive_weight: lambda2; 0 leaves the loss out.
        level_weights: w_d of the first levels; levels beyond have the last one.
        temperature: tau.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        num_levels: int = 3,
        codebook_size: int = 256,
        latent_dim: int = 32,
        network_dim: int = 128,
        commitment: float = 0.1,
        global_weight: float = 0.1,
        contrastive_weight: float = 0.01,
        level_weights: Sequence[float] = (1.0, 0.1),
        temperature: float = 0.1,
    ) -> None:
        super().__init__(
            input_dim=input_dim,
            num_levels=num_levels,
            codebook_size=codebook_size,
            latent_dim=latent_dim,
            network_dim=network_dim,
            commitment=commitment,
        )
        check_at_least(0, global_weight=global_weight, contrastive_weight=contrastive_weight)
        if temperature <= 0:
            raise HpgrError(f"temperature must be above 0, got {temperature}")
        if not level_weights:
            raise HpgrError("level_weights must have at least one number, got none")
        self.global_weight, self.contrastive_weight = global_weight, contrastive_weight
        self.level_weights, self.temperature = tuple(level_weights), temperature

    def forward(self, anchors: Tensor, positives: Tensor | None = None) -> Tensor:
        """See `RQVAE.forward`."""
        loss = super().forward(anchors)
        if self.contrastive_weight and positives is not None and self.num_levels > 1:
            loss = loss + self.contrastive_weight * self.contrastive_loss(anchors, positives)
        return loss

    def quantisation_loss(self, z: Tensor, quantised: Quantised) -> Tensor:
        """L_global, over the sum of all levels, times its weight."""
        zhat = quantised.words.sum(0)
        loss = F.mse_loss(zhat, z.detach()) + self.commitment * F.mse_loss(z, zhat.detach())
        return self.global_weight * loss

    def contrastive_loss(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """L_cont of anchors and their positives `[R, input_dim]`, of those that have one."""
        has_one = positives.isfinite().all(1)
        if not bool(has_one.any()):
            return anchors.new_zeros(())
        own = self._codewords(anchors)
        others = self._codewords(positives[has_one])
        mine = torch.arange(len(anchors), device=anchors.device)[has_one]
        total = anchors.new_zeros(())
        for level in range(self.num_levels - 1):
            words, positive = F.normalize(own[level], dim=1), F.normalize(others[level], dim=1)
            negative = words[has_one] @ words.T / self.temperature
            # The positive may be in the batch too, by its value: it is no negative.
            same = _equal_rows(anchors[mine], anchors)
            same |= _equal_rows(positives[has_one], anchors)
            negative = negative.masked_fill(same, -torch.inf)
            match = (words[has_one] * positive).sum(1, keepdim=True) / self.temperature
            losses = torch.cat([match, negative], 1).logsumexp(1) - match.squeeze(1)
            weight = self.level_weights[min(level, len(self.level_weights) - 1)]
            total = total + weight * losses.mean()
        return total / (self.num_levels - 1)

    def _codewords(self, embeddings: Tensor) -> Tensor:
        """Codewords `[D, R, H]`, with a gradient to the codebooks and, straight through, to z."""
        quantised = self.quantise(self.encode(embeddings))
        return quantised.words + (quantised.rests - quantised.rests.detach())


def kmeans(
    points: Tensor, size: int, generator: torch.Generator, *, from_groups: bool = False
) -> Tensor:
    """Cluster centres `[size, H]` of points `[R, H]`; empty clusters move to far points.

    With fewer points than centres, the points themselves, and copies of them.

    Args:
        points: what is clustered.
        size: of the codebook.
        generator: on the CPU.
        from_groups: start from the means of random groups in place of random points. In many
            dimensions all points are nearer to one in the middle than to each other: where such a
            point is drawn, its cluster takes nearly all of them.
    """
    drawn = torch.randperm(len(points), generator=generator)
    repeats = -(-size // len(points))
    centres = points[drawn.repeat(repeats)[:size].to(points.device)].clone()
    if size >= len(points):
        return centres
    if from_groups:
        centres, _ = _means(points, drawn.to(points.device) % size, size)
    for _ in range(KMEANS_ITERATIONS):
        nearest, place = _distances(points, centres).min(1)
        centres, counts = _means(points, place, size)
        empty = (counts == 0).nonzero().squeeze(1)
        centres[empty] = points[nearest.topk(len(empty)).indices]
    return centres


def _means(points: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means `[size, H]` of the points at each place, 0 where there are none, and their numbers."""
    counts = place.bincount(minlength=size)
    sums = points.new_zeros(size, points.shape[1]).index_add_(0, place, points)
    return sums / counts.clamp(min=1).unsqueeze(1), counts


def _equal_rows(left: Tensor, right: Tensor) -> Tensor:
    """Which rows are equal, bool `[R, S]`; products of matrices would not give exact zeros."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist") == 0


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances `[R, K]`."""
    return points.square().sum(1, keepdim=True) - 2 * points @ centres.T + centres.square().sum(1)


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
