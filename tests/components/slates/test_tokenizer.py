"""Tokenizers: what they learn on planted clusters, and the measures of their quality."""

import math

import pytest
import torch

from hpgr_plugin.components.slates.quality import codebook_use, collision_rate, consistency
from hpgr_plugin.components.slates.tokenizer import (
    CRQVAE,
    RQVAE,
    STEPS_TO_DEATH,
    ItemTokenizer,
    ResidualKMeans,
    kmeans,
)

TRAINED = [CRQVAE, RQVAE]
SMALL = {"num_levels": 2, "codebook_size": 8}


def clusters(
    items: int = 120, groups: int = 8, size: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings around far centres, and the group of each."""
    rng = torch.Generator().manual_seed(0)
    group = torch.arange(items) % groups
    centres = 3 * torch.randn(groups, size, generator=rng)
    return centres[group] + 0.3 * torch.randn(items, size, generator=rng), group


def fitted(cls: type[ItemTokenizer], embeddings: torch.Tensor, steps: int = 0, **more: object):
    torch.manual_seed(0)
    model = cls(input_dim=embeddings.shape[1], **{**SMALL, **more})
    model.fit_codebooks(embeddings, torch.Generator().manual_seed(0))
    if steps:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(embeddings, embeddings.roll(8, 0)).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("cls", [ResidualKMeans, *TRAINED])
def test_the_first_digit_is_the_planted_cluster(cls: type[ItemTokenizer]) -> None:
    embeddings, group = clusters()
    digits = fitted(cls, embeddings, steps=200 if cls.trains else 0).digits(embeddings)
    pairs = torch.stack([group, digits[:, 0]], 1).unique(dim=0)
    assert len(pairs) <= 10  # one digit per cluster, give or take
    assert consistency(embeddings, digits) > 0.9


@pytest.mark.parametrize("cls", TRAINED)
def test_training_lowers_the_reconstruction_error(cls: type[RQVAE]) -> None:
    embeddings, _ = clusters()
    untrained, trained = fitted(cls, embeddings), fitted(cls, embeddings, steps=200)
    with torch.no_grad():
        before, after = (x.reconstruction_error(embeddings) for x in (untrained, trained))
    assert after < 0.3 * before


@pytest.mark.parametrize("cls", TRAINED)
def test_every_weight_receives_a_gradient(cls: type[RQVAE]) -> None:
    embeddings, _ = clusters()
    model = fitted(cls, embeddings).train()
    model(embeddings, embeddings.roll(8, 0)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_loss_of_crqvae_by_hand() -> None:
    embeddings, _ = clusters(6)
    model = fitted(CRQVAE, embeddings, contrastive_weight=0.0)
    z = model.encode(embeddings)
    zhat = model.quantise(z).words.sum(0)
    x = model.normalised(embeddings)
    torch.testing.assert_close(x.square().mean(1), torch.ones(6))
    wanted = (model.decoder(zhat) - x).square().mean() + 0.1 * 1.1 * (zhat - z).square().mean()
    torch.testing.assert_close(model(embeddings), wanted)


def test_the_contrastive_loss_by_hand() -> None:
    embeddings, _ = clusters(5)
    model = fitted(CRQVAE, embeddings, codebook_size=5)
    positives = embeddings.roll(1, 0)
    positives[4] = math.nan  # has none
    words = model.quantise(model.encode(embeddings)).words[0]
    cosine = torch.nn.functional.cosine_similarity(words.unsqueeze(1), words.unsqueeze(0), dim=2)
    psi = (cosine / 0.1).exp()
    losses = []
    for a in range(4):
        p = (a - 1) % 5
        negatives = sum(psi[a, n] for n in range(5) if n not in (a, p))
        losses.append(-(psi[a, p] / (psi[a, p] + negatives)).log())
    wanted = torch.stack(losses).mean()
    torch.testing.assert_close(model.contrastive_loss(embeddings, positives), wanted)
    nothing = torch.full_like(positives, math.nan)
    assert float(model.contrastive_loss(embeddings, nothing)) == 0


def test_a_dead_codeword_is_put_back_to_work() -> None:
    embeddings, _ = clusters()
    model = fitted(CRQVAE, embeddings).train()
    with torch.no_grad():
        model.codebooks[0, 3] = 1e3
    assert 3 not in model.digits(embeddings)[:, 0]
    for _ in range(STEPS_TO_DEATH):
        model(embeddings)
    assert model.codebooks[0, 3].abs().max() < 1e2


def test_more_codewords_than_items() -> None:
    embeddings, _ = clusters(5)
    for cls in (ResidualKMeans, *TRAINED):
        digits = fitted(cls, embeddings, codebook_size=16).digits(embeddings)
        assert digits.shape == (5, 2)
        assert int(digits.max()) < 16


def test_an_item_that_comes_later_is_encoded_as_one_of_its_cluster() -> None:
    embeddings, _ = clusters()
    model = fitted(ResidualKMeans, embeddings)
    later = embeddings[:8] + 0.01
    assert torch.equal(model.digits(later)[:, 0], model.digits(embeddings[:8])[:, 0])


def test_a_point_in_the_middle_does_not_take_the_others() -> None:
    """Rests of a level: in many dimensions, and near 0 for items that the level before hits."""
    draw = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(2000, 64, generator=draw), dim=1)
    points = torch.where(torch.rand(2000, 1, generator=draw) < 0.02, 0.01 * points, points)
    most = {}
    for from_groups in (False, True):
        centres = kmeans(points, 64, torch.Generator().manual_seed(0), from_groups=from_groups)
        counts = torch.cdist(points, centres).argmin(1).bincount(minlength=64)
        most[from_groups] = int(counts.max())
    assert most[True] < 100
    assert most[False] > 1500  # or from_groups is not needed any more


def test_kmeans_leaves_no_cluster_empty() -> None:
    points = torch.cat([torch.zeros(50, 2), torch.randn(20, 2)])
    centres = kmeans(points, 10, torch.Generator().manual_seed(0))
    nearest = torch.cdist(points, centres).argmin(1)
    assert len(nearest.unique()) >= 9


def test_measures_by_hand() -> None:
    digits = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1]])
    assert collision_rate(digits) == 0.25
    assert codebook_use(digits, 2) == pytest.approx([1.0, 0.8112781])
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert consistency(embeddings, digits, neighbours=1) == 1.0
    assert consistency(embeddings, digits, neighbours=3) == pytest.approx(1 / 3)
