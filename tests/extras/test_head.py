"""The head of a language model: the loss without all logits is the loss with them."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import train
from extras import head, lm
from extras.head import IGNORED, padded_vocabulary, token_logits, token_loss
from mask import METHODS

WORDS, WIDTH = 101, 8  # not a multiple of 64


@pytest.fixture
def numbers():
    """Hidden states of 30 tokens, the embeddings of a vocabulary, and labels, some of IGNORED."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    labels = torch.randint(WORDS, (30,), generator=generator)
    labels[::5] = IGNORED
    return draw(30, WIDTH), draw(WORDS, WIDTH), labels


def gradients(loss, tensors):
    return torch.autograd.grad(3 * loss, tensors)  # 3: the loss is scaled, as by a part's share


@pytest.mark.parametrize("tokens", [4, 7, 30, 4096])  # at the same time
def test_loss_and_gradients_are_those_of_all_logits(numbers, tokens, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", tokens)
    *tensors, labels = numbers
    loss = token_loss(*tensors, labels)
    expected = F.cross_entropy(F.linear(*tensors), labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=1e-6)
    found = gradients(loss, tensors)
    for mine, theirs in zip(found, gradients(expected, tensors), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_what_is_frozen_gets_no_gradient(numbers):
    states, words, labels = numbers
    loss = token_loss(states, words.detach(), labels)
    expected = F.cross_entropy(states @ words.detach().T, labels)
    assert torch.allclose(*gradients(loss, [states]), *gradients(expected, [states]), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_same(numbers, dtype):
    """There the product gives float32 at once, so bfloat16 agrees to its rounding."""
    *tensors, labels = numbers
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    moved = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    expected = token_loss(*tensors, labels)
    loss = token_loss(*moved, labels.cuda())
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    for mine, theirs in zip(gradients(loss, moved), gradients(expected, tensors), strict=True):
        assert torch.allclose(mine.cpu(), theirs, rtol=close, atol=close)


def test_in_bfloat16_the_loss_is_of_float32(numbers):
    """Its sum is taken in float32: only the logits are rounded."""
    *tensors, labels = numbers
    states, words = (tensor.detach().bfloat16() for tensor in tensors)
    expected = F.cross_entropy(F.linear(states, words).float(), labels)
    assert torch.allclose(token_loss(states, words, labels), expected, rtol=1e-6)


def test_a_word_of_no_probability_has_a_finite_loss():
    """By hand: one word has the logit 200, the others 0. exp(-200) is 0 in float32."""
    words = torch.zeros(5, 1)
    words[2] = 200
    loss = token_loss(torch.ones(2, 1), words, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx((0 + 200) / 2)


@pytest.mark.parametrize("count", [63, 64, 65])
def test_padding_is_never_seen_and_never_likely(count):
    generator = torch.Generator().manual_seed(0)
    states = -torch.rand(2, 3, WIDTH, generator=generator)
    words = torch.rand(count, WIDTH, generator=generator)  # all logits are below the padding's 0
    logits = token_logits(states, words)
    assert torch.allclose(logits, states @ words.T, atol=1e-6)
    assert len(padded_vocabulary(words)) == 64 * (1 + (count > 64))
    labels = torch.zeros(6, dtype=torch.long)
    loss = token_loss(states.flatten(0, 1), words, labels)
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), labels), rtol=1e-5)


def test_a_language_model_computes_the_loss_of_its_logits(make_gpt2, monkeypatch):
    """And its step has the gradients of train.py's."""
    monkeypatch.setattr(head, "CHUNK", 10)
    model, _ = lm.load(make_gpt2(), 8, "words")
    model.eval().requires_grad_(False)
    ids = torch.arange(24).view(3, 8) % model.config.vocab_size
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    inputs = torch.stack([ids, ids * 0, ids * 0 + 1])
    learner = train.Learner(model, METHODS["smp-s"], torch.float32)
    for scores in learner.masks.scores.values():
        scores.data.normal_(generator=torch.Generator().manual_seed(1))
    assert functional_call(model, {}, (*inputs, labels)).shape == ()

    found = []
    for make in (train.make_forward_backward, lm.make_forward_backward):
        learner.zero_grad()
        losses = make(model, learner)(inputs, labels, 0.5, 0.5, 10.0)
        found.append([losses, *(p.grad.clone() for p in learner.parameters())])
    for plain, mine in zip(*found, strict=True):
        assert torch.allclose(plain, mine, rtol=1e-4, atol=1e-7)
