"""The smallest one: a network of fixed random weights learns to read digits, only by a mask.

Change one thing at a time (means of seeds 0 to 2; unchanged 0.975). Read mask.py next: same names.

    grad * weight * mask, in StraightThrough   0.921   a removed weight never comes back
    RAMP 1                                     0.954   nine tenths go before scores can say which
    PENALTY = 0.0                              0.962   nothing pulls down what the loss can spare
    DENSITY = 0.02                             0.788   too little is left
"""

import torch

SEED, STEPS, RAMP = 0, 600, 300  # weights are removed in the first RAMP of all STEPS
DENSITY = 0.1  # the share of weights that is left then
PENALTY = 30.0  # how hard the regularizer pulls
FONT = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##.."""
DIGITS = torch.tensor([[c == "#" for c in five] for five in FONT.split()]).view(7, 10, 5)


def draw(n):  # n digits in noise, at one of nine places -> pictures [n, 11 * 9], labels [n]
    pictures, labels = 0.3 * torch.randn(n, 11, 9), torch.randint(10, (n,))
    places = torch.randint(1, 4, (n, 2)).tolist()
    for picture, label, (down, right) in zip(pictures, labels, places, strict=True):
        picture[down : down + 7, right : right + 5] += DIGITS[:, label]
    return pictures.flatten(1), labels


def density_at(step, ramp, final):  # all weights at first, then fewer: quickly, and later slowly
    return final + (1 - final) * max(0, 1 - step / ramp) ** 3


def highest(scores, k):  # top-k: the mask keeps the weights with the k highest scores
    best = scores.detach().flatten().topk(k).indices
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(scores)


class StraightThrough(torch.autograd.Function):  # W' = W * M(S); backwards as if M(S) were S
    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):  # removed weights get a gradient too, so they can come back
        weight, mask = ctx.saved_tensors
        return None, grad * weight, None


def mean_sigmoid(scores):  # pulled down by the regularizer; scores that the loss needs resist
    return torch.stack([torch.sigmoid(s).mean() for s in scores])


def network(pictures, weights):
    return (pictures @ weights[0].T).relu() @ weights[1].T  # [n, 99] -> [n, 512] -> [n, 10]


torch.manual_seed(SEED)
torch.set_num_threads(1)  # in so small a network, threads would only wait for each other
weights = [torch.randn(out, n) * (2 / (DENSITY * n)) ** 0.5 for out, n in ((512, 99), (10, 512))]
scores = [torch.zeros_like(w, requires_grad=True) for w in weights]  # all that is learnt
optimizer = torch.optim.Adam(scores)
test_pictures, test_labels = draw(2000)
for step in range(STEPS + 1):
    density = density_at(step, RAMP, DENSITY)
    masks = [highest(s, int(density * s.numel())) for s in scores]
    masked = list(map(StraightThrough.apply, weights, scores, masks))
    if step % 100 == 0:
        answers = network(test_pictures, masked).argmax(1)
        accuracy = (answers == test_labels).float().mean()
        print(f"step {step:3}  density {density:.3f}  accuracy {accuracy:.3f} (guessing: 0.1)")
    pictures, labels = draw(64)
    loss = torch.nn.functional.cross_entropy(network(pictures, masked), labels)
    regularizer = mean_sigmoid(scores).mean()
    optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / STEPS)
    optimizer.zero_grad()
    (loss + PENALTY * regularizer).backward()
    optimizer.step()

print(f"A new digit: the network says {answers[0]}. Beside it: how many weights each pixel keeps.")
kept = masks[0].float().mean(0)  # [512, 99] -> [99]
both = (test_pictures[0].view(11, 9), torch.zeros(11, 1), (kept / kept.max()).view(11, 9))
for row in torch.cat(both, 1).clamp(0, 1):
    print("".join(2 * " ░▒▓█"[int(4.99 * v)] for v in row))
