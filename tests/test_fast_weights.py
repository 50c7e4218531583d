"""Fast weights: the equations, the two forms, and associative retrieval."""

from dataclasses import replace

import pytest
import torch

from seqkern.models.fast_weights import FastWeights, FastWeightsConfig
from seqkern.tasks.job import JobSpec
from seqkern.tasks.options import TrainOptions
from seqkern.tasks.registry import make_job
from seqkern.tasks.retrieval import questions
from seqkern.tasks.training import Trainer

SIZES = FastWeightsConfig(9, 4, embedding=6, hidden=8, readout=10, inner=2, decay=0.9, rate=0.3)
RETRIEVAL = {"pairs": 2, "train": 20_000, "dev": 1000, "test": 1000}


def make(config, layers="seqkern"):
    torch.manual_seed(3)
    return FastWeights(config, layers).double()


def by_hand(model, x):
    """Scores of one sequence (T,), with the matrix A of equation (1)."""
    p, config = dict(model.named_parameters()), model.config
    R = config.hidden
    h, A = torch.zeros(R, dtype=torch.float64), torch.zeros(R, R, dtype=torch.float64)
    for w in x:
        slow = p["recurrent.W.weight"] @ h
        slow = slow + p["recurrent.C.weight"] @ p["embed.weight"][w] + p["recurrent.C.bias"]
        h_s = slow.clamp(min=0)
        for _ in range(config.inner):
            sums = slow + A @ h_s
            centred = sums - sums.mean()
            normed = centred / torch.sqrt(centred.pow(2).mean() + 1e-5)
            h_s = (normed * p["recurrent.norm.weight"] + p["recurrent.norm.bias"]).clamp(min=0)
        h = h_s
        A = config.decay * A + config.rate * torch.outer(h, h)
    hidden = (p["hidden.weight"] @ h + p["hidden.bias"]).clamp(min=0)
    return p["output.weight"] @ hidden + p["output.bias"]


@pytest.mark.parametrize("form", ["matrix", "attention"])
@pytest.mark.parametrize("inner", [1, 3])
def test_scores_are_the_equations(form, inner):
    model, x = make(replace(SIZES, form=form, inner=inner)), torch.randint(9, (5, 7))
    scores = model(x)
    for b, row in enumerate(x):
        torch.testing.assert_close(scores[b], by_hand(model, row), rtol=1e-11, atol=1e-12)


def test_both_forms_are_one_function():
    """Equations (1) and (4): equal up to rounding, forward and backward."""
    x, found = torch.randint(9, (5, 12)), []
    for form in ("matrix", "attention"):
        model = make(replace(SIZES, form=form))
        scores = model(x)
        scores.logsumexp(-1).sum().backward()
        found.append({"scores": scores, **{n: p.grad for n, p in model.named_parameters()}})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("cell", ["LSTM", "IRNN"])
def test_the_baselines_read_with_either_layers(cell):
    x, found = torch.randint(9, (5, 7)), []
    for layers in ("torch", "seqkern"):
        model = make(replace(SIZES, cell=cell), layers)
        scores = model(x)
        scores.logsumexp(-1).sum().backward()
        found.append({"scores": scores, **{n: p.grad for n, p in model.named_parameters()}})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-12, msg=name)


def test_first_values():
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(make(SIZES).recurrent.W.weight, 0.05 * eye, rtol=1e-6, atol=0)
    irnn = make(replace(SIZES, cell="IRNN")).recurrent
    assert torch.equal(irnn.weight_hh_l0, eye)
    assert not irnn.bias_hh_l0.any()
    assert not irnn.bias_ih_l0.any()


def test_neighbours_do_not_change_a_row():
    model, x = make(SIZES), torch.randint(9, (5, 7))
    together = model(x)
    for b in range(5):
        torch.testing.assert_close(model(x[b : b + 1])[0], together[b], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "tensor"}, "form must be one of .* got 'tensor'"),
        ({"cell": "GRU"}, "cell must be one of .* got 'GRU'"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1"),
        ({"rate": 0}, "rate must be positive, got 0"),
        ({"inner": 0}, "inner must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SIZES, **change)


def test_bad_sequences_are_refused():
    with pytest.raises(ValueError, match=r"x must be \(B, T\) with B, T >= 1, got \(2, 0\)"):
        make(SIZES)(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="layers must be one of"):
        FastWeights(SIZES, "cudnn")


# ---- the task -----------------------------------------------------------------------------


def test_questions_have_their_answers():
    drawn = questions(200, 4, seed=5)
    for text, answer in drawn:
        shown, key = text[:8], text[-1]
        assert text[8:10] == "??"
        assert len(set(shown[::2])) == 4
        assert answer == shown[shown.index(key) + 1]
    assert drawn == questions(200, 4, seed=5)
    assert drawn != questions(200, 4, seed=6)
    # Every pair is asked for, and every digit is an answer.
    assert {text.index(text[-1]) for text, _ in drawn} == {0, 2, 4, 6}
    assert {answer for _, answer in drawn} == set("0123456789")


@pytest.mark.parametrize(("count", "pairs"), [(0, 4), (5, 0), (5, 27)])
def test_impossible_questions_are_refused(count, pairs):
    with pytest.raises(ValueError, match=f"got {count} and {pairs}"):
        questions(count, pairs, seed=0)


@pytest.fixture(scope="module")
def trained():
    """Fast weights of 50 units after 400 steps on two pairs."""
    job = make_job(JobSpec("fast-weights", "retrieval", sizes={"hidden": 50}, reading=RETRIEVAL))
    options = TrainOptions(steps=400, lr=1e-2, warmup=20, optimizer="adam", weight_decay=0)
    for _ in Trainer(job, options).train(400):
        pass
    return job


def test_two_pairs_are_retrieved(trained):
    """Toy task: after 400 steps two answers in a hundred may be wrong; by chance it were 90."""
    assert trained.evaluate("test")["error"] <= 0.02
    assert trained.predict(["c9k8??c", "c9k8??k", "k8c9??c"]) == ["9", "8", "9"]


def test_the_score_counts_wrong_answers(trained):
    examples = trained.data.dev
    found = trained.predict([question.text for question in examples[:200]])
    trained.data.dev[:] = examples[:200]
    wrong = sum(a != q.answer for a, q in zip(found, examples[:200], strict=True)) / 200
    assert trained.evaluate("dev", batch_size=33)["error"] == wrong


@pytest.mark.parametrize("text", ["", "c9", "c9?c", "c9k??c", "9c??c", "c9??9", "c9!!c", "C9??C"])
def test_what_is_no_question_is_refused(trained, text):
    with pytest.raises(ValueError, match="expected pairs"):
        trained.predict([text])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="must be one of retrieval, got 'copy'"):
        make_job(JobSpec("fast-weights", "copy"))
