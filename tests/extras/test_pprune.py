"""extras.pprune: distances by hand, clusters by brute force, budgets, and a whole run."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from acts import interrupt
from conftest import load_model

import data
import eval as eval_
import train
from extras import pprune
from model import Config
from plumbing.checkpoints import cutting_tokenizer, model_files
from plumbing.files import write_whole

BASE = Config(30522, 768, 12, 12, 3072, 512, 2)


def partition(groups):
    return sorted(sorted(group) for group in groups)


def brute_force(distances, threshold):
    """Complete linkage by definition: merge the two nearest clusters while they are near enough."""
    profiles = distances.numpy()
    groups = [[i] for i in range(len(profiles))]

    def apart(a, b):
        return max(np.abs(profiles[i] - profiles[j]).max() for i in a for j in b)

    while len(groups) > 1:
        height, a, b = min(
            (apart(groups[a], groups[b]), a, b) for b in range(len(groups)) for a in range(b)
        )
        if height > threshold:
            break
        groups[a] += groups.pop(b)
    return partition(groups)


@pytest.mark.parametrize("seed", range(6))
def test_clusters_are_those_of_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 5 + 4 * seed
    distances = pprune.neuron_distances(torch.randn(12, n, generator=generator))
    found = pprune.merges(distances)
    assert len(found) == n - 1
    for threshold in (0.0, *np.quantile([height for height, _, _ in found], [0.2, 0.5, 0.9]), 2.0):
        assert partition(pprune.clusters(n, found, threshold)) == brute_force(distances, threshold)


def test_units_that_do_the_same_are_together_from_the_start():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    same = torch.cat([x, -2 * x[:, :2]], dim=1)  # |cos| does not see sign or size
    assert partition(pprune.clusters(6, pprune.merges(pprune.neuron_distances(same)), 1e-5)) == [
        [0, 4],
        [1, 5],
        [2],
        [3],
    ]
    one = torch.ones(3, 1)
    assert pprune.merges(pprune.neuron_distances(one)) == [] and pprune.clusters(1, [], 0.5) == [
        [0]
    ]
    assert not pprune.neuron_distances(torch.zeros(5, 3)).isnan().any()  # a neuron that never fires


def test_heads_are_matched_dimension_by_dimension():
    assert pprune.matched(torch.tensor([[0.9, 0.8], [0.85, 0.1]])) == pytest.approx(
        (0.9 + 0.1) / 2
    )  # not 0.8 + 0.85
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    shuffled = x[:, [2, 0, 1]] * torch.tensor([-1.0, 3.0, 0.5])
    other = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    distances = pprune.head_distances(torch.cat([x, other, shuffled], dim=1), heads=3)
    assert distances[0, 2] == pytest.approx(0, abs=1e-6) and distances[0, 1] > 0.3
    assert torch.equal(distances, distances.T)


def test_the_threshold_is_the_lowest_that_is_enough():
    layers = [[(0.5, 0, 1), (0.2, 1, 2)], [(0.3, 0, 1)]]  # 3 and 2 units
    wanted = {5: -1.0, 4: 0.2, 3: 0.3, 2: 0.5, 9: -1.0}
    assert {keep: pprune.lowest_threshold(layers, keep) for keep in wanted} == wanted


def test_the_strongest_of_a_cluster_stays():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 3 * x[:, :1], 0.5 * x[:, 1:2]], dim=1)
    distances, strength = pprune.neuron_distances(x), x.abs().mean(0)
    (kept,) = pprune.representatives([distances], [strength], keep=4)
    assert kept.tolist() == [1, 2, 3, 4]


def test_budgets_add_up():
    head, neuron = pprune.multiply_accumulates(BASE, 100)
    assert (head, neuron) == (4 * 100 * 768 * 64 + 2 * 100**2 * 64, 2 * 100 * 768)
    heads, neurons = pprune.budget(BASE, 100, 0.4, 5.0)
    gone = [(144 - heads) * head, (12 * 3072 - neurons) * neuron]
    whole = 144 * head + 12 * 3072 * neuron
    assert 0.4 * whole <= sum(gone) < 0.4 * whole + head + neuron  # rounded up to whole units
    assert gone[1] / gone[0] == pytest.approx(5, rel=0.05)
    assert pprune.budget(BASE, 100, 0.0, 5.0) == [144, 12 * 3072]


def test_an_impossible_budget_says_what_is_possible():
    """At length 100 a layer's heads have 0.347 of the work: 12 units, of which 11 can go."""
    said = "with --ffn-share 0.1 takes 0.636 of .* and 0.064 from neurons, but 0.31. and 0.65. can"
    with pytest.raises(ValueError, match=f"--sparsity 0.7 {said}"):
        pprune.budget(BASE, 100, 0.7, 0.1)


def test_every_budget_is_kept_or_refused():
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(2000):
        layers = int(rng.integers(1, 6))
        heads, neurons = (
            tuple(rng.integers(1, 5, layers).tolist()),
            tuple(rng.integers(1, 30, layers).tolist()),
        )
        config = dataclasses.replace(
            BASE,
            num_hidden_layers=layers,
            heads_per_layer=heads,
            neurons_per_layer=neurons,
            num_attention_heads=4,
        )
        sparsity, share = rng.uniform(0, 1), float(10 ** rng.uniform(-2, 2))
        try:
            kept = pprune.budget(config, 20, sparsity, share)
            assert layers <= kept[0] <= sum(heads) and layers <= kept[1] <= sum(neurons)
            outcomes.add("kept")
        except ValueError as error:
            assert "can go at most" in str(error)
            outcomes.add("refused")
    assert outcomes == {"kept", "refused"}


def test_even_shares_add_up_in_layers_of_any_size():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = [torch.rand(int(n)) for n in rng.integers(1, 30, int(rng.integers(1, 6)))]
        keep = int(rng.integers(len(scores), sum(map(len, scores)) + 1))
        kept = pprune.evenly(scores, keep)
        assert sum(map(len, kept)) == keep and all(
            1 <= len(k) <= len(s) for k, s in zip(kept, scores, strict=True)
        )
        for k, s in zip(kept, scores, strict=True):
            assert s[k].min() >= s.sort(descending=True).values[len(k) - 1]
    shares = [len(k) / 30 for k in pprune.evenly([torch.rand(30), torch.rand(30)], 31)]
    assert shares == [16 / 30, 15 / 30]


EIGHT_TOKENS = data.Examples([[0] * 8], [[0] * 8], [0], 8)


@pytest.mark.parametrize("units", ["clusters", "activation", "random", "fisher"])
def test_what_stays(examples, tmp_path, units):
    """Neurons 0 to 11 are copies of 12 to 23, half as strong. Clustering keeps the strong ones."""
    model = load_model(tmp_path / "model", [3, 4])
    for layer in model.bert.encoder["layer"]:
        inner, outer = layer.intermediate["dense"], layer.output.dense
        inner.weight.data[12:], inner.bias.data[12:] = inner.weight.data[:12], inner.bias.data[:12]
        outer.register_forward_pre_hook(
            lambda m, x: (x[0] * torch.cat([torch.full((12,), 0.5), torch.ones(12)]),)
        )
    costs = pprune.multiply_accumulates(model.config, 8.0)
    sparsity = 24.5 * costs[1] / (8 * costs[0] + 48 * costs[1])
    args = SimpleNamespace(method="p-...", sparsity=sparsity, ffn_share=1000.0, seed=0)
    smaller, facts = pprune.prune(model, examples, {"dev": EIGHT_TOKENS}, args, "cpu", units)
    neurons = [  # found by their outgoing weights, which no two have in common
        (old.output.dense.weight[:, :, None] == new.output.dense.weight[:, None]).all(0).nonzero()
        for old, new in zip(model.bert.encoder["layer"], smaller.bert.encoder["layer"], strict=True)
    ]
    neurons = [pairs[:, 0] for pairs in neurons]
    kept = sum(map(len, neurons))
    assert 22 <= kept <= 24 and facts["layers"] == smaller.config.layers
    strong = sum(int((k >= 12).sum()) for k in neurons)
    assert (strong == kept) == (units == "clusters")
    strengths = [x.abs().mean(0) for x in pprune.activations(model, examples, "cpu", 0)[1]]
    strongest = [
        sorted(s.topk(len(k)).indices.tolist()) for s, k in zip(strengths, neurons, strict=True)
    ]
    assert ([k.tolist() for k in neurons] == strongest) == (units == "activation")
    for old, new, k in zip(
        model.bert.encoder["layer"], smaller.bert.encoder["layer"], neurons, strict=True
    ):
        assert new.intermediate["dense"].weight.equal(old.intermediate["dense"].weight[k])


def test_activations_that_are_not_finite(examples, tmp_path):
    model = load_model(tmp_path / "model", [3, 4])
    model.bert.encoder["layer"][0].intermediate["dense"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="--model: its activations are not finite"):
        pprune.choose(model, "clusters", examples, [6, 40], "cpu", 0)


def test_what_has_lost_a_block_is_not_shrunk_again():
    with pytest.raises(ValueError, match="--model: a layer of it has lost"):
        pprune.budget(dataclasses.replace(BASE, heads_per_layer=(0,) + (12,) * 11), 100, 0.2, 5.0)


@pytest.fixture
def examples(make_model, glue):
    tokenizer = cutting_tokenizer(make_model(), 16)
    return data.load_split("movies", "train", glue, tokenizer)


def test_activations_are_what_goes_into_the_projections(examples, tmp_path):
    """All tokens, in batches of several lengths, against one text at a time."""
    model = load_model(tmp_path / "model", [3, 4])
    lengths = sorted(len(ids) for ids in examples.ids)
    heads, neurons = pprune.activations(model, examples, "cpu", seed=0, tokens=sum(lengths))
    assert [x.shape for x in (*heads, *neurons)] == [(sum(lengths), 16)] * 2 + [
        (sum(lengths), 24)
    ] * 2
    model.eval()
    layer, sums = model.bert.encoder["layer"][1], [0.0, 0.0]
    for n, linear in enumerate((layer.attention["output"].dense, layer.output.dense)):
        linear.register_forward_pre_hook(
            lambda m, x, n=n: sums.__setitem__(n, sums[n] + x[0].double().sum(0))
        )
    with torch.no_grad():
        for row in range(len(examples)):
            inputs, _ = data.collate(examples, [row], width=len(examples.ids[row]))
            model.bert(*inputs)
    assert torch.allclose(heads[1].double().sum(0), sums[0], rtol=1e-3, atol=1e-3)
    assert torch.allclose(neurons[1].double().sum(0), sums[1], rtol=1e-3, atol=1e-3)
    few = [pprune.activations(model, examples, "cpu", seed, tokens=7) for seed in (1, 1, 2)]
    assert (
        few[0][0][0].shape == (7, 16)
        and few[0][0][0].equal(few[1][0][0])
        and not few[0][0][0].equal(few[2][0][0])
    )


@pytest.mark.parametrize(
    "method",
    [
        "p-pruning",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("p-activation", "p-random", "p-fisher")
        ),
    ],
)
def test_a_run_is_smaller_and_can_be_looked_at_and_teach(
    make_model, glue, tmp_path, capsys, fails, method
):
    model, run = make_model(), tmp_path / "run"
    given = ["--data-dir", glue, "--steps", 20, "--length", 16, "--evals", 2, "--device", "cpu"]
    given += ["--weight-lr", 1e-3]
    flags = ["--method", method, "--sparsity", 0.4, "--ffn-share", 2]
    train.main([str(a) for a in ["--model", model, "--out", run, *given, *flags]])
    said, result = capsys.readouterr().out, json.loads((run / "result.json").read_text())
    heads, neurons = (sum(part) for part in zip(*result["layers"], strict=True))
    costs = pprune.multiply_accumulates(load_model(model, [3]).config, result["tokens"])
    share = (heads * costs[0] + neurons * costs[1]) / (8 * costs[0] + 48 * costs[1])
    assert f"{heads} of 8 heads and {neurons} of 48 neurons stay: {share:.4f}" in said
    assert share == pytest.approx(result["multiply_accumulates"]) and 0.53 < share <= 0.6
    assert (run / "model.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size
    eval_.main([str(run)])
    said = capsys.readouterr().out
    assert f"accuracy {result['final']['accuracy']:.4f}\ntraining reported" in said
    left = [tuple(layer) for layer in result["layers"]]
    assert f"heads and neurons left in each layer: {left}\n" in said
    train.main(
        [
            str(a)
            for a in ["--model", model, "--out", tmp_path / "taught", *given[:-2], "--teacher", run]
        ]
    )
    config = run / "config.json"
    config.write_text(
        config.read_text().replace('"vocab_size"', '"layer_norm_eps": 0.5, "vocab_size"')
    )
    assert "the config of" in fails(eval_.main, [run, "--text", "good"])


def test_masks_need_layers_of_one_size(make_model, glue, tmp_path, fails):
    folder, uneven = make_model(), tmp_path / "uneven"
    heads, neurons = [torch.arange(4), torch.arange(3)], [torch.arange(24)] * 2
    smaller = pprune.shrink(load_model(folder, [3, 4]), heads, neurons)
    files = model_files(folder, smaller.published(smaller.state_dict()), smaller.config)
    for name, content in files.items():
        write_whole(uneven / name, content)
    given = ["--model", uneven, "--data-dir", glue, "--length", 16, "--device", "cpu"]
    assert "needs layers of one size" in fails(train.main, given)
    train.main([str(a) for a in [*given, "--method", "finetune", "--steps", 2, "--out", "run"]])
    eval_.main(["run"])


@pytest.mark.parametrize("method", ["p-pruning", "p-activation"])
def test_a_table_of_only_empty_texts_trains(run, glue, method):
    for split in ("train", "dev"):
        rows = "".join(f"\t{n % 2}\n" for n in range(20))
        (glue / "movies" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    flags = ["--method", method, "--ffn-share", 1]
    assert run(*flags, steps=3)[1]["final"]["accuracy"] == 0.5


def test_an_interrupted_run_chooses_the_same_units_again(run):
    flags = ["--method", "p-pruning", "--sparsity", 0.3, "--ffn-share", 2, "--evals", 8]
    whole, _ = run(*flags, out="whole", steps=16)
    argv = run.argv(*flags, out="cut", steps=16)
    interrupt(argv, step=6)
    cut = whole.parent / "cut"
    assert not (cut / "result.json").exists()
    train.main(["--resume", str(cut)])
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (whole, cut))
    assert one == other


def test_fisher_scores_are_squared_gradients_of_gates(make_model):
    """By definition: the loss of each input alone, with a factor on the columns of one unit."""
    model = load_model(make_model(), words=[5, 6])
    rows = [[2, 7, 8, 9, 3], [2, 10, 3], [2, 11, 12, 3]]
    examples = data.Examples(rows, [[0] * len(row) for row in rows], [0, 1, 1], 16)
    heads, neurons = pprune.fisher(model, examples, torch.device("cpu"), seed=0)
    assert model.training and not any(p.grad is not None for p in model.parameters())

    model.eval()
    for group, found, size in (("attn_output", heads, 4), ("output", neurons, 1)):
        for layer, name in enumerate(model.prunable()[group]):
            weight = model.get_parameter(name).detach()
            units = weight.shape[1] // size
            total = torch.zeros(units)
            for row in range(len(rows)):
                gates = torch.ones(units, requires_grad=True)
                changed = {name: weight * gates.repeat_interleave(size)}
                inputs, label = data.collate(examples, [row], torch.device("cpu"))
                logits = torch.func.functional_call(model, changed, tuple(inputs))
                pprune.summed_loss(logits, label).backward()
                total += gates.grad.square()
            assert torch.allclose(found[layer], total, rtol=1e-3, atol=1e-7)


def test_the_highest_scores_of_all_layers_stay_and_one_in_each():
    scores = [torch.tensor([0.1, 0.3, 0.2]), torch.tensor([5.0, 7.0, 6.0])]
    kept = pprune.highest_overall(scores, 3)
    assert [units.tolist() for units in kept] == [[1], [1, 2]]
    assert [len(units) for units in pprune.highest_overall(scores, 2)] == [1, 1]
    assert scores[0].tolist() == pytest.approx([0.1, 0.3, 0.2])  # as they were
