"""The head of a language model: logits and loss over a vocabulary of tens of thousands of words.

A logit for each word and token fills gigabytes, so training never holds all of them. And GPT-2 has
50,257 words, an odd number: with rows of that length, a GPU's fast kernels cannot read the logits.
So the words are padded to a multiple of 64, and nobody sees the padding.

    logits = token_logits(states, rows)
    loss = token_loss(states.flatten(0, 1), rows, None, labels.flatten())
"""

import torch
import torch.nn.functional as F

ROWS = 64  # words are padded to a multiple of it
TOKENS = 4096  # so many tokens have logits at the same time
NOTHING = -100  # the label of a token that predicts nothing


def padded(rows, bias=None):
    """Rows [V, H] and bias [V] -> [V', H] and [V'], where V' is the next multiple of 64.

    The bias of the padding is -inf, so that its probability is 0.
    """
    if bias is None:
        bias = rows.new_zeros(len(rows))
    more = -len(rows) % ROWS
    return F.pad(rows, (0, 0, 0, more)), F.pad(bias, (0, more), value=float("-inf"))


def token_logits(states, rows, bias=None):
    """Hidden states [..., H] and a vocabulary's rows [V, H], bias [V] -> logits [..., V]."""
    return F.linear(states, *padded(rows, bias))[..., : len(rows)]


def softmax_loss(logits, labels):
    """Logits [N, V], labels [N] -> each token's loss [N], in float32, and its gradient [N, V]."""
    labels = labels.clamp(min=0)[:, None]  # [N, 1]; NOTHING may be any word, as it will not count
    log_probabilities = logits.log_softmax(1, dtype=torch.float32)
    losses = -log_probabilities.gather(1, labels)

    # The gradient is the probability of each word, but for the label probability - 1.
    gradient = torch.exp(log_probabilities, out=torch.empty_like(logits))  # without a float32 copy
    gradient.scatter_(1, labels, torch.expm1(-losses).to(gradient.dtype))
    return losses[:, 0], gradient


def token_loss(states, rows, bias, labels, softmax_loss=softmax_loss):
    """Mean cross-entropy of token_logits of states [N, H] with labels [N] -> [] in float32.

    Tokens with the label NOTHING do not count. softmax_loss may be compiled.
    """
    return TokenLoss.apply(states, rows, bias, labels, softmax_loss)


class TokenLoss(torch.autograd.Function):
    """token_loss. It computes the gradients right away, as long as it has the logits.

    The backward pass only scales them: the loss is one number, and its gradient is another.
    """

    @staticmethod
    def forward(ctx, states, rows, bias, labels, softmax_loss):
        rows_padded, bias_padded = padded(rows, bias)  # [V', H], [V']
        counts = labels != NOTHING
        share = (counts / counts.sum())[:, None]  # what a token counts in the mean [N, 1]

        loss = torch.zeros((), device=states.device)
        of_states = torch.empty_like(states)
        of_rows = torch.zeros_like(rows_padded)
        of_bias = torch.zeros_like(bias_padded)
        for start in range(0, len(states), TOKENS):
            part = slice(start, start + TOKENS)
            logits = F.linear(states[part], rows_padded, bias_padded)  # [TOKENS, V']
            losses, gradient = softmax_loss(logits, labels[part])
            loss += (losses * share[part, 0]).sum()

            # The share scales the small factor of each product instead of the gradient [N, V'].
            of_states[part] = (gradient @ rows_padded) * share[part]
            if ctx.needs_input_grad[1]:
                of_rows.addmm_(gradient.T, (states[part] * share[part]).to(rows.dtype))
            if ctx.needs_input_grad[2]:
                of_bias.addmv_(gradient.T, share[part, 0].to(rows.dtype))
        ctx.save_for_backward(of_states, of_rows[: len(rows)], of_bias[: len(rows)])
        return loss

    @staticmethod
    def backward(ctx, scale):
        of_states, of_rows, of_bias = ctx.saved_tensors
        of_rows = of_rows * scale if ctx.needs_input_grad[1] else None
        of_bias = of_bias * scale if ctx.needs_input_grad[2] else None
        return of_states * scale, of_rows, of_bias, None, None
