"""The head of a language model: logits and loss over a vocabulary of tens of thousands of words.

A logit for each token and word fills gigabytes, so training never holds all of them. And GPT-2 has
50,257 words, an odd number: a GPU's fast kernels cannot read rows of that length. So the words are
padded to a multiple of 64, and nobody sees the padding.

    logits = token_logits(states, words)
    loss = token_loss(states.flatten(0, 1), words, labels.flatten())

N tokens, H wide, and V words, whose embeddings [V, H] are the head's weight.
"""

import torch
import torch.nn.functional as F

MULTIPLE = 64  # of which V' is one, the number of words with the padding
TOKENS = 4096  # so many tokens have logits at the same time
NOTHING = -100  # the label of a token that predicts nothing


def padded(words):
    """Embeddings [V, H] -> [V', H], and a bias [V'] that gives the padding a probability of 0."""
    more = -len(words) % MULTIPLE
    bias = F.pad(words.new_zeros(len(words)), (0, more), value=float("-inf"))
    return F.pad(words, (0, 0, 0, more)), bias


def token_logits(states, words):
    """Hidden states [..., H] and embeddings [V, H] -> logits [..., V]."""
    return F.linear(states, *padded(words))[..., : len(words)]


def softmax_loss(logits, labels):
    """Logits [N, V], labels [N] -> each token's loss [N], in float32, and its gradient [N, V]."""
    labels = labels.clamp(min=0)[:, None]  # [N, 1]; for NOTHING any word will do: it counts nothing
    log_probabilities = logits.log_softmax(1, dtype=torch.float32)
    losses = -log_probabilities.gather(1, labels)

    # The gradient is the probability of each word, but for the label probability - 1.
    gradient = torch.exp(log_probabilities, out=torch.empty_like(logits))  # rounds as it goes
    gradient.scatter_(1, labels, torch.expm1(-losses).to(gradient.dtype))
    return losses[:, 0], gradient


def token_loss(states, words, labels, softmax_loss=softmax_loss):
    """Mean cross-entropy of token_logits of states [N, H] with labels [N] -> [] in float32.

    Tokens with the label NOTHING do not count. softmax_loss may be compiled.
    """
    return TokenLoss.apply(states, words, labels, softmax_loss)


class TokenLoss(torch.autograd.Function):
    """token_loss. It computes the gradients right away, while it has the logits.

    The backward pass only scales them, as the loss is one number.
    """

    @staticmethod
    def forward(ctx, states, words, labels, softmax_loss):
        words_padded, bias = padded(words)  # [V', H], [V']
        counts = labels != NOTHING
        share = (counts / counts.sum())[:, None]  # of each token in the mean [N, 1]

        loss = torch.zeros((), device=states.device)
        of_states = torch.empty_like(states)
        of_words = torch.zeros_like(words_padded)
        for start in range(0, len(states), TOKENS):
            part = slice(start, start + TOKENS)
            logits = F.linear(states[part], words_padded, bias)  # [TOKENS, V']
            losses, gradient = softmax_loss(logits, labels[part])
            loss += (losses * share[part, 0]).sum()

            # Scaling the small factors [TOKENS, H] costs less than scaling the gradient.
            of_states[part] = (gradient @ words_padded) * share[part]
            if ctx.needs_input_grad[1]:
                of_words.addmm_(gradient.T, (states[part] * share[part]).to(words.dtype))
        ctx.save_for_backward(of_states, of_words[: len(words)])
        return loss

    @staticmethod
    def backward(ctx, scale):
        of_states, of_words = ctx.saved_tensors
        of_words = of_words * scale if ctx.needs_input_grad[1] else None
        return of_states * scale, of_words, None, None
