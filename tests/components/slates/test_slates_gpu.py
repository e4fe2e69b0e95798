"""On a CUDA device: decoding and tokenizing give what they give on the CPU, also under autocast."""

import pytest
import torch
from small_slates import KINDS, catalogue, decoder_of, users

from hpgr_plugin.components.slates.beam import Allowed
from hpgr_plugin.components.slates.tokenizer import CRQVAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_slates_are_those_of_the_cpu(kind: str, width: int) -> None:
    ids, context = catalogue(200, codebook_size=8), users()
    model = decoder_of(kind, ids)
    wanted = model.generate(context, Allowed.all_but(ids, None, least=4), width=width)
    moved = type(context)(*(x.cuda() for x in context))
    model = model.cuda()
    found = model.generate(moved, Allowed.all_but(model.ids, None, least=4), width=width)
    assert torch.equal(found.items.cpu(), wanted.items)
    torch.testing.assert_close(found.log_probs.cpu(), wanted.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_decoding_under_autocast(kind: str) -> None:
    ids = catalogue(200, codebook_size=8)
    model = decoder_of(kind, ids).cuda()
    context = type(users())(*(x.cuda() for x in users()))
    slates = torch.randint(0, 200, (3, 4)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = -model.log_probs(context, slates).sum()
        loss.backward()
        found = model.generate(context, Allowed.all_but(model.ids, None, least=4), width=3)
    exact = -model.log_probs(context, slates).sum()
    assert float(loss) == pytest.approx(float(exact), rel=0.05)
    assert all(len(set(row)) == 4 for row in found.items.tolist())


def test_a_tokenizer_gives_the_digits_of_the_cpu() -> None:
    vectors = torch.randn(300, 16)
    model = CRQVAE(input_dim=16, codebook_size=16)
    model.fit_codebooks(vectors, torch.Generator().manual_seed(0))
    wanted = model.digits(vectors)
    model = model.cuda()
    same = (model.digits(vectors.cuda()).cpu() == wanted).float().mean()
    assert same > 0.99
    model(vectors.cuda(), vectors.cuda().roll(1, 0)).backward()
    assert torch.isfinite(model.codebooks.grad).all()
