"""The BiLSTM tagger: its equations, spellings, CRF and intents, both layers, and a toy task."""

import itertools
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from seqkern.models.tagger import BiLSTMTagger, Spellings, TaggerConfig
from tests.cells_by_hand import bilstm_states

BOTH = pytest.mark.parametrize("layers", ["torch", "seqkern"])

WORDS = TaggerConfig(11, 3, embedding=5, hidden=6, dropout=0.0)
SPELT = replace(WORDS, letters=9, letter_embedding=4, spelling=6)
CONFIGS = {
    "words": WORDS,
    "spelt": SPELT,
    "crf": replace(WORDS, crf=True),
    "joint": replace(WORDS, intents=4, depth=2),
    "all": replace(SPELT, crf=True, intents=4),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def build(name, layers="seqkern"):
    if CONFIGS[name].crf:
        pytest.importorskip("torchcrf", reason="the CRF is pytorch-crf's, which is optional")
    torch.manual_seed(3)
    return BiLSTMTagger(CONFIGS[name], layers)


def sentences(letters=True, B=4, T=6):
    """x, lengths, y and spellings of 5 different words of 1 to 4 letters."""
    lengths = torch.tensor([3, 6, 1, 4][:B])
    past = torch.arange(T) >= lengths[:, None]
    x = torch.randint(4, 11, (B, T)).masked_fill(past, 0)
    y = torch.randint(3, (B, T)).masked_fill(past, 0)
    if not letters:
        return x, lengths, y, None
    n = torch.tensor([2, 4, 1, 3, 4])
    spelt = torch.randint(4, 9, (5, 4)).masked_fill(torch.arange(4) >= n[:, None], 0)
    return x, lengths, y, Spellings(spelt, n, torch.randint(5, (B, T)).masked_fill(past, 0))


def row(b, n, spellings):
    """The spellings of row b alone."""
    return spellings and spellings._replace(word=spellings.word[b : b + 1, :n])


def by_hand(p, x, spelt):
    """P (T, tags) and the scores of the intents for words (T,) and the letters of each."""
    e = p["embed.weight"][x]
    if spelt is not None:
        ends = []
        for letters in spelt:
            forwards, backwards = bilstm_states(p, "speller", p["embed_letters.weight"][letters])
            ends.append(torch.cat([forwards[-1], backwards[0]]))
        e = torch.cat([e, torch.stack(ends)], 1)
    h = torch.cat(bilstm_states(p, "lstm", e), 1)
    scores = h @ p["output.weight"].T + p["output.bias"]
    if "intent.weight" not in p:
        return scores, None
    return scores, p["intent.weight"] @ h.max(0).values + p["intent.bias"]


def path_score(p, scores, tags):
    """s(x, y) of a CRF."""
    total = p["crf.start_transitions"][tags[0]] + p["crf.end_transitions"][tags[-1]]
    total = total + sum(p["crf.transitions"][a, b] for a, b in itertools.pairwise(tags))
    return total + sum(scores[t, tag] for t, tag in enumerate(tags))


@BOTH
@pytest.mark.parametrize("name", ["words", "spelt", "all"])
def test_scores_and_losses_are_the_equations(name, layers):
    """Of a CRF over all 3**n paths; the decoded tags are the best of them."""
    model = build(name, layers).double()
    p = dict(model.named_parameters())
    x, lengths, y, spellings = sentences(bool(model.config.letters))
    found = model(x, lengths, spellings)
    losses, intents = model.losses(x, lengths, y, spellings)
    decoded, best_intents = model.decode(x, lengths, spellings)
    for b, n in enumerate(lengths.tolist()):
        spelt = spellings and [
            spellings.letters[w, : spellings.lengths[w]] for w in spellings.word[b, :n]
        ]
        scores, of_intents = by_hand(p, x[b, :n], spelt)
        torch.testing.assert_close(found.tags[b, :n], scores, rtol=1e-12, atol=1e-13)
        tags = y[b, :n].tolist()
        if model.config.crf:
            paths = list(itertools.product(range(3), repeat=n))
            of_paths = torch.stack([path_score(p, scores, path) for path in paths])
            expected = of_paths.logsumexp(0) - path_score(p, scores, tags)
            best = list(paths[of_paths.argmax()])
        else:
            expected = sum(-scores.log_softmax(1)[t, tag] for t, tag in enumerate(tags))
            best = scores.argmax(1).tolist()
        torch.testing.assert_close(losses[b], expected, rtol=1e-10, atol=1e-12)
        assert decoded[b] == best
        if of_intents is not None:
            torch.testing.assert_close(intents[b], of_intents, rtol=1e-12, atol=1e-13)
            assert best_intents[b] == of_intents.argmax()


@BOTH
@EVERY
def test_neighbours_and_padding_do_not_change_a_row(name, layers):
    model = build(name, layers).double()
    x, lengths, y, spellings = sentences(bool(model.config.letters))
    together, losses = model(x, lengths, spellings), model.losses(x, lengths, y, spellings)[0]
    wider = spellings and Spellings(
        F.pad(spellings.letters, (0, 2), value=5), spellings.lengths, F.pad(spellings.word, (0, 3))
    )
    padded = model.losses(F.pad(x, (0, 3), value=7), lengths, F.pad(y, (0, 3), value=2), wider)[0]
    torch.testing.assert_close(padded, losses, rtol=1e-12, atol=1e-13)
    for b, n in enumerate(lengths.tolist()):
        own = row(b, n, spellings)
        alone = model(x[b : b + 1, :n], lengths[b : b + 1], own)
        torch.testing.assert_close(alone.tags[0], together.tags[b, :n], rtol=1e-12, atol=1e-13)
        if alone.intents is not None:
            torch.testing.assert_close(
                alone.intents[0], together.intents[b], rtol=1e-12, atol=1e-13
            )
        loss = model.losses(x[b : b + 1, :n], lengths[b : b + 1], y[b : b + 1, :n], own)[0]
        torch.testing.assert_close(loss[0], losses[b], rtol=1e-12, atol=1e-13)


@EVERY
def test_both_layers_train_alike(name):
    """The same parameters; gradients in float64 to rounding; losses of 50 steps in float32."""
    z, runs = torch.tensor([0, 3, 2, 1]), []
    x, lengths, y, spellings = sentences(bool(CONFIGS[name].letters))

    def loss_of(model):
        of_tags, intents = model.losses(x, lengths, y, spellings)
        return of_tags.mean() + (0 if intents is None else F.cross_entropy(intents, z))

    for layers in ("torch", "seqkern"):
        model = build(name, layers).double()
        loss_of(model).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        scores = model(x, lengths, spellings).tags
        model, losses = build(name, layers), []
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(50):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((build(name, layers).state_dict(), gradients, scores, losses))
    (state, gradients, scores, losses), (our_state, our_gradients, our_scores, our_losses) = runs
    assert our_state.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(our_state[key], value), key
        gradient = gradients[key]
        assert gradient is not None, key
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    torch.testing.assert_close(our_scores, scores, rtol=1e-10, atol=1e-12)
    assert our_losses[:3] == pytest.approx(losses[:3], rel=1e-5)
    assert our_losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_is_refused():
    x, lengths, _, spellings = sentences()
    with pytest.raises(ValueError, match="letters=9 takes spellings"):
        build("spelt")(x, lengths)
    with pytest.raises(ValueError, match="letters=0 takes no spellings"):
        build("words")(x, lengths, spellings)
    with pytest.raises(ValueError, match=r"lengths must be in 1 .. 6, got 0 .. 6"):
        build("words")(x, lengths.clone().fill_(6).index_fill(0, torch.tensor([1]), 0))
    empty = spellings._replace(lengths=torch.tensor([2, 4, 0, 3, 4]))
    with pytest.raises(ValueError, match=r"lengths of words must be in 1 .. 4, got 0 .. 4"):
        build("spelt")(x, lengths, empty)
    with pytest.raises(ValueError, match=r"the 4 rows of the sentences, got \(3, 6\)"):
        build("spelt")(x, lengths, spellings._replace(word=spellings.word[:3]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tags": 0}, "tags must be at least 1, got 0"),
        ({"letters": -1}, "letters must not be negative, got -1"),
        ({"intents": -2}, "intents must not be negative, got -2"),
        ({"hidden": 5}, "hidden must be even, half for each direction, got 5"),
        ({"spelling": 3}, "spelling must be even, half for each direction, got 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(WORDS, **wrong)


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match=r"layers must be one of .* got 'cudnn'"):
        BiLSTMTagger(WORDS, "cudnn")


def test_without_the_package_a_crf_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcrf", None)
    with pytest.raises(ModuleNotFoundError, match=r"crf=True needs the package pytorch-crf: pip"):
        BiLSTMTagger(CONFIGS["crf"])
    assert BiLSTMTagger(WORDS).crf is None


@pytest.mark.parametrize("by_letter", [False, True])
def test_tags_of_the_neighbours_are_learnt(by_letter):
    """The tag of a word is the next one's kind: its number or, by letter, its first letter."""
    torch.manual_seed(1)
    config = TaggerConfig(
        *(12, 8, 12 if by_letter else 0), embedding=16, hidden=32, letter_embedding=8, dropout=0.0
    )
    model = BiLSTMTagger(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    letters = torch.randint(4, 12, (64, 4))  # 64 words of 4 letters

    def draw(rows, T=12):
        lengths, word = torch.randint(2, T + 1, (rows,)), torch.randint(64, (rows, T))
        kind = letters[word, 0] if by_letter else torch.randint(4, 12, (rows, T))
        y = kind.roll(-1, 1) - 4
        y[torch.arange(rows), lengths - 1] = 0  # after the last word there is none
        spellings = Spellings(letters, torch.full((64,), 4), word) if by_letter else None
        return torch.full_like(kind, 4) if by_letter else kind, lengths, y, spellings

    for _ in range(250):
        x, lengths, y, spellings = draw(32)
        loss = model.losses(x, lengths, y, spellings)[0].sum() / lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, lengths, y, spellings = draw(200)
    found, _ = model.decode(x, lengths, spellings)
    wrong = sum(tags != y[b, : lengths[b]].tolist() for b, tags in enumerate(found))
    assert wrong == 0


def test_tagger_example(example):
    out = example("tagger.py", "--steps", "100", "play me some by Enya")
    assert float(re.search(r"F1 of phrases ([\d.]+)%", out)[1]) >= 90
    assert "play me some by Enya\tO O O O B-artist" in out
