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

MULTIPLE = 64  # V', the number of words with the padding, is a multiple of this
CHUNK = 4096  # tokens that have logits at the same time
IGNORED = -100  # the label of a token that predicts nothing


def padded_vocabulary(words):
    """Embeddings [V, H] -> [V', H]. The padding is zeros."""
    return F.pad(words, (0, 0, 0, -len(words) % MULTIPLE))


def token_logits(states, words):
    """Hidden states [..., H] and embeddings [V, H] -> logits [..., V]."""
    return F.linear(states, padded_vocabulary(words))[..., : len(words)]


def float32_logits(states, padded):
    """Hidden states [N, H], embeddings [V', H] -> logits [N, V'] in float32.

    On a CPU the product is rounded to the dtype of the states first.
    """
    if states.is_cuda:  # float32 at once: to convert from bfloat16 is another pass over gigabytes
        return torch.mm(states, padded.T, out_dtype=torch.float32)
    return (states @ padded.T).float()


def softmax_loss(logits, labels, dtype):
    """Logits [N, V] in float32, labels [N] -> losses [N], and their gradients [N, V] in dtype."""
    labels = labels.clamp(min=0)[:, None]  # [N, 1]; for IGNORED any word will do: it does not count
    log_probabilities = logits.log_softmax(1)
    losses = -log_probabilities.gather(1, labels)

    # The gradient is softmax(logits) - one_hot(label).
    gradient = torch.empty_like(logits, dtype=dtype)
    torch.exp(log_probabilities, out=gradient)  # rounds as it goes
    gradient.scatter_(1, labels, torch.expm1(-losses).to(dtype))
    return losses[:, 0], gradient


def token_loss(states, words, labels, softmax_loss=softmax_loss):
    """Mean cross-entropy of token_logits of states [N, H] with labels [N] -> [] in float32.

    Tokens with the label IGNORED do not count. softmax_loss may be compiled.
    """
    return TokenLoss.apply(states, words, labels, softmax_loss)


class TokenLoss(torch.autograd.Function):
    """token_loss. It computes the gradients right away, while it has the logits.

    The backward pass only scales them, as the loss is one number.
    """

    @staticmethod
    def forward(ctx, states, words, labels, softmax_loss):
        padded = padded_vocabulary(words)  # [V', H]
        counts = labels != IGNORED
        share = (counts / counts.sum())[:, None]  # of each token in the mean [N, 1]

        loss = torch.zeros((), device=states.device)
        grad_states = torch.empty_like(states)
        grad_words = torch.zeros_like(padded) if ctx.needs_input_grad[1] else None
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            logits = float32_logits(states[part], padded)  # [CHUNK, V']
            logits[:, len(words) :] = float("-inf")  # the padding has a probability of 0
            losses, gradient = softmax_loss(logits, labels[part], states.dtype)
            loss += (losses * share[part, 0]).sum()

            # Scaling the small factors [CHUNK, H] costs less than scaling the gradient.
            grad_states[part] = (gradient @ padded) * share[part]
            if grad_words is not None:
                grad_words.addmm_(gradient.T, (states[part] * share[part]).to(words.dtype))
        ctx.save_for_backward(grad_states, grad_words)
        ctx.count = len(words)
        return loss

    @staticmethod
    def backward(ctx, scale):
        grad_states, grad_words = ctx.saved_tensors
        if grad_words is not None:
            grad_words = grad_words[: ctx.count] * scale
        return grad_states * scale, grad_words, None, None
